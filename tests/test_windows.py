"""Windows over blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprune.engine.windows import windows_over
from reprune.errors import ConfigError


def _trained(num_blocks: int, window: int, stride: int) -> list[list[int]]:
    return [list(range(it.first, it.stop)) for it in windows_over(num_blocks, window, stride)]


@pytest.mark.parametrize("num_blocks", [2, 3, 12])
def test_the_studys_cross_block_windows(num_blocks: int) -> None:
    """Catches a window off by one: {0}, {0,1}, … {L−2,L−1}, {L−1}, so that every block is trained twice."""
    pairs = [[block, block + 1] for block in range(num_blocks - 1)]
    assert _trained(num_blocks, 2, 1) == [[0], *pairs, [num_blocks - 1]]


def test_single_blocks_and_whole_model() -> None:
    """Catches clipping that loses the ends: window 1 is each block once, window L with stride L the whole model."""
    assert _trained(4, 1, 1) == [[0], [1], [2], [3]]
    assert _trained(4, 4, 4) == [[0, 1, 2, 3]]
    assert _trained(5, 2, 2) == [[0, 1], [2, 3], [4]]
    assert _trained(3, 3, 1) == [[0], [0, 1], [0, 1, 2], [1, 2], [2]]


@st.composite
def _sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    num_blocks = draw(st.integers(1, 40))
    window = draw(st.integers(1, num_blocks))
    return num_blocks, window, draw(st.integers(1, window))


@given(_sizes())
def test_blocks_enter_once_and_are_frozen_once_in_order(sizes: tuple[int, int, int]) -> None:
    """Catches blocks pruned twice, never, out of order, trained after they were frozen or before they were pruned."""
    num_blocks, window, _ = sizes
    windows = windows_over(*sizes)
    assert [it.index for it in windows] == list(range(len(windows)))
    assert [block for it in windows for block in range(it.new, it.stop)] == list(range(num_blocks))
    assert [block for it in windows for block in range(it.first, it.frozen)] == list(range(num_blocks))
    entered = 0
    for it in windows:
        assert it.new == entered
        assert it.first <= it.new <= it.stop
        assert it.first <= it.frozen <= it.stop
        assert 1 <= it.stop - it.first <= window
        entered = it.stop
    for earlier, later in pairwise(windows):
        assert later.first == earlier.frozen


@given(st.integers(1, 20), st.integers(1, 20))
def test_a_window_larger_than_the_model_is_an_error(num_blocks: int, excess: int) -> None:
    """Catches a silent clip to a smaller window, which would be another technique under the same name."""
    with pytest.raises(ConfigError, match=rf"reconstruction\.window.*\n.*{num_blocks + excess}"):
        windows_over(num_blocks, num_blocks + excess, 1)
