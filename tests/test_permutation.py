"""Orders of channels for N:M: the linear assignment against brute force, and what it keeps against the heuristic."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import plan_of
from reprune.build import build
from reprune.errors import ConfigError
from reprune.identity import canonical
from reprune.pruning import channel_permutation
from reprune.pruning.channel_permutation import (
    assign_channels,
    assign_position,
    retained_score,
    spread_channels,
)
from reprune.pruning.ria import RIA
from reprune.sparsity.mixed_groups import MixedOfGroup
from reprune.sparsity.patterns import KeptOfGroup
from support import layer_context


def _scores(rows: int, columns: int, seed: int) -> Tensor:
    """Scores of channels unlike one another."""
    stream = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=stream) * torch.rand(columns, generator=stream).pow(3)


def _kept(scores: Tensor, order: list[int], group: int, kept: int) -> float:
    """What is retained, in plain loops."""
    total = 0.0
    for row in scores.double().tolist():
        for start in range(0, len(order), group):
            total += sum(sorted(row[channel] for channel in order[start : start + group])[-kept:])
    return total


@pytest.mark.parametrize(("group", "kept"), [(2, 1), (4, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_every_position_is_assigned_as_brute_force_does(group: int, kept: int, seed: int) -> None:
    """Catches an assignment of groups to channels, a wrong weight that is displaced, and positions that are not taken in turn."""
    scores = _scores(6, 5 * group, seed)
    groups = torch.randperm(5 * group, generator=torch.Generator().manual_seed(seed)).reshape(5, group)
    moved, order = 0, groups.reshape(-1)
    for position in range(group):
        tried = []
        for channels in permutations(groups[:, position].tolist()):
            other = groups.clone()
            other[:, position] = torch.tensor(channels)
            tried.append(_kept(scores, other.reshape(-1).tolist(), group, kept))
        now = assign_position(scores, groups, position, kept)
        assert _kept(scores, now.reshape(-1).tolist(), group, kept) == pytest.approx(max(tried), rel=1e-12)
        fixed = [other for other in range(group) if other != position]
        assert torch.equal(now[:, fixed], groups[:, fixed])
        moved += not torch.equal(now, groups)
        groups = now
    assert moved > 0
    assert torch.equal(assign_channels(scores, order, group, kept), groups.reshape(-1))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.sampled_from([(2, 1), (4, 2), (4, 3), (8, 3), (8, 8)]))
def test_it_keeps_no_less_than_the_heuristic(seed: int, counts: tuple[int, int]) -> None:
    """Catches an assignment that minimises, and one that loses channels."""
    group, kept = counts
    scores = _scores(5, 6 * group, seed)
    order = spread_channels(scores.sum(dim=0), group)
    assigned = assign_channels(scores, order, group, kept)
    assert sorted(assigned.tolist()) == list(range(6 * group))
    before, after = (_kept(scores, one.tolist(), group, kept) for one in (order, assigned))
    assert after >= before * (1 - 1e-6)
    assert retained_score(scores, assigned, group, kept) == pytest.approx(after)


def test_ria_keeps_more_by_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an order that is computed and not used, a count that is not the layer's, and results that depend on memory."""
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 64, generator=stream) * torch.rand(64, generator=stream).exp()
    layer = layer_context(torch.randn(24, 64, generator=stream), inputs)
    scores = RIA().score(layer)
    for pattern, sparsity in ((KeptOfGroup(kept=2, group=4), 0.5), (MixedOfGroup(kept=4, group=8), 3 / 8)):
        kept, masks = [], []
        for permute in (False, "heuristic", "assignment"):
            masks.append(RIA(permute=permute).prune(layer, pattern, sparsity).keep)
            assert float(masks[-1].float().mean()) == 1 - sparsity
            kept.append(float(scores[masks[-1]].sum()))
        assert max(kept[:2]) < kept[2]
        monkeypatch.setattr(channel_permutation, "CHUNK_BYTES", 1)
        assert torch.equal(RIA(permute="assignment").prune(layer, pattern, sparsity).keep, masks[-1])
        monkeypatch.undo()


def test_a_choice_has_one_run(tmp_path: Path) -> None:
    """Catches two runs of one choice, one run of two choices, a word that is no choice, and steps after an assigned mask."""
    built = {
        permute: build({"_target_": "reprune.pruning.ria.RIA", "permute": permute}, "pruner")
        for permute in (False, True, "heuristic", "assignment")
    }
    named = {permute: canonical(pruner) for permute, pruner in built.items()}
    # What these runs had before there was an assignment.
    assert named[False]["permute"] is False
    assert named[True] == named["heuristic"]
    assert named[True]["permute"] is True
    assert named["assignment"]["permute"] == "assignment"
    with pytest.raises(ConfigError, match="assignment"):
        build({"_target_": "reprune.pruning.ria.RIA", "permute": "assigment"}, "pruner")
    with pytest.raises(ConfigError) as refused:
        plan_of(tmp_path, "pruner=ria", "pattern=2to4", "pruner.permute=assignment", "refine=sparse_swaps")
    assert refused.value.key == "pruner.permute"
    # It would be another run of the same numbers.
    with pytest.raises(ConfigError) as refused:
        plan_of(tmp_path, "pruner=ria", "pattern=unstructured", "pruner.permute=true")
    assert refused.value.key == "pruner.permute"
