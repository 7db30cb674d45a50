"""Patterns: exact counts, ties, rounding, and one meaning of N:M."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reprune.errors import ConfigError
from reprune.model.device import GOLDEN, SAMPLE, kth_lowest, narrowed
from reprune.sparsity.patterns import Group, KeptOfGroup, Unstructured, count_removed, keep_highest

ROWS, COLUMNS = 3, 8


def _scores(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(ROWS, COLUMNS)


few_values = st.lists(st.integers(0, 3), min_size=ROWS * COLUMNS, max_size=ROWS * COLUMNS).map(_scores)


@given(few_values, st.integers(0, COLUMNS))
def test_exact_count_of_the_lowest_whatever_ties(scores: torch.Tensor, removed: int) -> None:
    """Catches `score <= threshold`, which removes all of a tie, and a mask that keeps a lower score than it drops."""
    keep = keep_highest(scores, removed)
    for row, kept in zip(scores, keep, strict=True):
        assert int((~kept).sum()) == removed
        if 0 < removed < COLUMNS:
            assert row[~kept].max() <= row[kept].min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kth_lowest_of_each_row(dtype: torch.dtype) -> None:
    """Catches a count from zero, and a selection along the other dimension."""
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1, 7] = -torch.inf
    for k in (1, 20, 50):
        assert torch.equal(kth_lowest(rows, k), rows.sort(dim=1).values[:, k - 1, None])


@pytest.mark.parametrize("kind", ["normal", "sorted", "equal", "few values", "not sampled", "infinite"])
def test_the_kth_lowest_of_many(kind: str) -> None:
    """Catches a bracket from a sample that misses the value, or counts what lies at its edge twice."""
    stream = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 24 * 5000, generator=stream)
    if kind == "sorted":
        rows = rows.sort(dim=1).values
    elif kind == "equal":
        rows = torch.ones_like(rows)
    elif kind == "few values":
        rows = rows.mul(2).round()
    elif kind == "not sampled":
        # All that the sample sees is unlike the rest.
        rows[:, (np.arange(SAMPLE) * GOLDEN % 1 * rows.shape[1]).astype(int)] += 100
    elif kind == "infinite":
        rows[:, ::3] = torch.inf
        rows[:, 1::3] = -torch.inf
    for k in (1, 2, 40000, 60000, 80001, rows.shape[1] - 1, rows.shape[1]):
        assert torch.equal(kth_lowest(rows, k), rows.sort(dim=1).values[:, k - 1, None])


@pytest.mark.parametrize("d_out", [576, 1024, 1536, 2048, 4096])
@pytest.mark.parametrize("d_in", [256, 512, 576, 688])
def test_few_of_many_are_looked_at(d_out: int, d_in: int) -> None:
    """Catches a sample that falls into few columns of a matrix whose columns are unlike: all would be looked at."""
    stream = torch.Generator().manual_seed(0)
    scales = torch.randn(d_in, generator=stream).exp()
    scores = (torch.randn(d_out, d_in, generator=stream).abs() * scales).flatten().numpy()
    left, between = narrowed(scores, len(scores) // 2)
    assert len(between) < len(scores) / 10
    assert np.sort(between)[left - 1] == np.sort(scores)[len(scores) // 2 - 1]


def test_among_equals_the_first_go() -> None:
    """Catches a choice among equals that depends on the sort algorithm, and so on the device."""
    keep = keep_highest(torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), 2)
    assert keep.tolist() == [[False, False, True, True], [False, False, True, True]]


@given(few_values, st.floats(0, 0.99))
def test_unstructured_counts_within_its_group(scores: torch.Tensor, sparsity: float) -> None:
    """Catches a comparison over the matrix where rows are asked for, and the reverse."""
    by_row = Unstructured().keep(scores, sparsity, Group.ROW)
    assert (~by_row).sum(dim=1).tolist() == [count_removed(COLUMNS, sparsity)] * ROWS
    by_matrix = Unstructured().keep(scores, sparsity, Group.MATRIX)
    removed = count_removed(ROWS * COLUMNS, sparsity)
    assert int((~by_matrix).sum()) == removed
    if 0 < removed < scores.numel():
        assert scores[~by_matrix].max() <= scores[by_matrix].min()


def test_matrix_and_row_differ() -> None:
    """Guards the test above: on these scores the two comparisons choose different weights."""
    scores = torch.arange(16.0).reshape(2, 8)
    assert Unstructured().keep(scores, 0.5, Group.MATRIX).sum(dim=1).tolist() == [0, 8]
    assert Unstructured().keep(scores, 0.5, Group.ROW).sum(dim=1).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("size", "sparsity", "removed"),
    [
        (5, 0.5, 3),
        (7, 0.5, 4),
        (1, 0.5, 1),
        (3, 0.5, 2),
        (10, 0.25, 3),
        (10, 0.24, 2),
        (10, 0.0, 0),
        (4, 0.125, 1),
    ],
)
def test_halves_are_rounded_up(size: int, sparsity: float, removed: int) -> None:
    """Catches Python's round, which goes to the even neighbour: 5 · 0.5 would be 2 and 3 · 0.5 would be 2."""
    assert count_removed(size, sparsity) == removed


@given(st.integers(1, 10**6), st.integers(0, 63))
def test_count_is_round_half_up(size: int, numerator: int) -> None:
    """Catches truncation and rounding to even, against exact fractions (64ths are exact in binary)."""
    exact = Fraction(size * numerator, 64)
    assert count_removed(size, numerator / 64) == floor(exact + Fraction(1, 2))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (4, 4)])
def test_n_of_m_keeps_n_highest(kept: int, group: int) -> None:
    """Catches the other reading of N:M, by which 1:4 and 3:4 change places, and groups over outputs."""
    scores = torch.rand(5, 4 * group, generator=torch.Generator().manual_seed(0))
    pattern = KeptOfGroup(kept=kept, group=group)
    keep = pattern.keep(scores, pattern.resolve(None), Group.ROW)
    for row in range(5):
        for start in range(0, 4 * group, group):
            inside = slice(start, start + group)
            best = set(scores[row, inside].topk(kept).indices.tolist())
            assert set(keep[row, inside].nonzero().flatten().tolist()) == best
    assert pattern.resolve(None) == pytest.approx(1 - kept / group)


@given(few_values, st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (1, 2)]))
def test_n_of_m_counts_with_ties(scores: torch.Tensor, ratio: tuple[int, int]) -> None:
    """Catches groups that keep more or fewer than n where scores are equal."""
    kept, group = ratio
    keep = KeptOfGroup(kept=kept, group=group).keep(scores, 1 - kept / group, Group.MATRIX)
    assert (keep.reshape(-1, group).sum(dim=1) == kept).all()


def test_what_does_not_fit_is_refused() -> None:
    """Catches a width that leaves a short group, a sparsity that contradicts the pattern, and one of 1 or more."""
    pattern = KeptOfGroup(kept=1, group=4)
    with pytest.raises(ConfigError, match="divide"):
        pattern.check_shape("0.q", (8, 6))
    pattern.check_shape("0.q", (6, 8))
    with pytest.raises(ConfigError, match="implies"):
        pattern.resolve(0.5)
    assert pattern.resolve(0.75) == 0.75
    with pytest.raises(ConfigError, match="kept"):
        KeptOfGroup(kept=5, group=4)
    for wrong in (1.0, -0.1, 1.5):
        with pytest.raises(ConfigError, match="range"):
            Unstructured().resolve(wrong)
