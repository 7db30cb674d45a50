"""Refinements of masks against brute force over swaps, naive loops and swaps worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import plan_of
from reprune.engine.statistics import InputStatistics
from reprune.errors import ConfigError, RunError
from reprune.pruning.bounded_swaps import AnyPair, product_bounds
from reprune.pruning.contract import LayerContext
from reprune.pruning.dsnot import DSnoT
from reprune.pruning.refinement import Refinement, refined
from reprune.pruning.sparse_swaps import SparseSwaps
from reprune.pruning.sparsegpt import SparseGPT
from reprune.sparsity.mixed_groups import MixedOfGroup
from reprune.sparsity.patterns import Group, KeptOfGroup, Pattern, Unstructured
from support import layer_context, option, options

# Pattern and sparsity, the last one with a count of its own as in a block of a mixed pattern.
PATTERNS: dict[str, tuple[Pattern, float]] = {
    "unstructured": (Unstructured(), 0.6),
    "2to4": (KeptOfGroup(kept=2, group=4), 0.5),
    "mixed": (MixedOfGroup(kept=4, group=8), 3 / 8),
}
EVERY_PATTERN = pytest.mark.parametrize("pattern_name", PATTERNS)
# `none` is no refinement, only a word for the lack of one.
EVERY_REFINEMENT = pytest.mark.parametrize(
    "name", [name for name in [name for name in options("refine") if name != "none"] if name != "none"]
)


def _layer(
    rows: int, columns: int, seed: int, *, dead: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> tuple[LayerContext, Tensor]:
    """A layer with correlated inputs that have means, and those inputs, float64 [tokens, columns]."""
    stream = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=stream) / columns**0.5
    inputs = torch.randn(3 * columns + 20, columns, generator=stream) @ mixing
    inputs += torch.randn(columns, generator=stream)
    inputs[:, list(dead)] = 0
    weight = torch.randn(rows, columns, generator=stream).to(dtype)
    return layer_context(weight, inputs), inputs.double()


def _mask(layer: LayerContext, pattern_name: str, seed: int = 0) -> Tensor:
    """A poor mask: rows keep unequal counts where the pattern leaves that open."""
    pattern, sparsity = PATTERNS[pattern_name]
    scores = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
    return pattern.keep(scores, sparsity, Group.MATRIX)


def _loss(layer: LayerContext, inputs: Tensor, keep: Tensor) -> Tensor:
    """‖(w − m⊙w)X‖² of every row, from the inputs themselves."""
    lost = layer.weight.double().masked_fill(keep, 0)
    return (lost @ inputs.T).square().sum(dim=1)


def _swaps(keep: Tensor, removed: Tensor | None, row: int, group: int | None) -> Iterator[tuple[int, int]]:
    """Every kept and pruned column of a row that may be swapped."""
    columns = keep.shape[1]
    for p in range(columns):
        for r in range(columns):
            barred = removed is not None and bool(removed[row, r])
            together = group is None or p // group == r // group
            if keep[row, p] and not keep[row, r] and not barred and together:
                yield p, r


def _greedy(layer: LayerContext, inputs: Tensor, keep: Tensor, group: int | None, max_swaps: int) -> Tensor:
    """The best swap of every row by evaluating all of them on the inputs, until there is none."""
    keep = keep.clone()
    for row in range(len(keep)):
        one = replace(layer, weight=layer.weight[row : row + 1])
        for _ in range(max_swaps):
            before = float(_loss(one, inputs, keep[row : row + 1]))
            best, chosen = before * (1 - 1e-6), None
            for p, r in _swaps(keep, layer.removed, row, group):
                swapped = keep[row : row + 1].clone()
                swapped[0, p], swapped[0, r] = False, True
                after = float(_loss(one, inputs, swapped))
                if after < best:
                    best, chosen = after, (p, r)
            if chosen is None:
                break
            keep[row, chosen[0]], keep[row, chosen[1]] = False, True
    return keep


@pytest.mark.parametrize("pattern", [Unstructured(), KeptOfGroup(kept=1, group=2)])
def test_one_swap_is_made_where_it_lowers_the_loss(pattern: Pattern) -> None:
    """Catches a wrong sign or factor in any term of the formula: 400 rows of two weights, where one swap is possible."""
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 2, generator=stream) @ torch.tensor([[1.0, 0.8], [0.0, 0.7]])
    layer = layer_context(torch.randn(400, 2, generator=stream), inputs)
    keep = torch.tensor([[True, False], [False, True]]).repeat(200, 1)
    refined = SparseSwaps().refine(layer, keep, pattern)
    swap = _loss(layer, inputs.double(), ~keep) < _loss(layer, inputs.double(), keep)
    assert 100 < int(swap.sum()) < 300
    assert torch.equal(refined, keep ^ swap[:, None])


@EVERY_PATTERN
@pytest.mark.parametrize("max_swaps", [1, 2, 100])
def test_every_swap_is_the_best_one(
    pattern_name: str, max_swaps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a cross term of the wrong pair, c that is not updated, a bound that hides the best pair, lost rows."""
    layer, inputs = _layer(5, 16, seed=3)
    keep = _mask(layer, pattern_name)
    pattern, _ = PATTERNS[pattern_name]
    expected = _greedy(layer, inputs, keep, pattern.columns, max_swaps)
    assert int((expected & ~keep).sum()) >= min(max_swaps, 3) * 2
    for together, widths, chunk in [(1, (2, 3), 1), (3, (1, 4), 5000), (64, (64,), 2**22)]:
        monkeypatch.setattr("reprune.pruning.bounded_swaps.KEPT_TOGETHER", together)
        monkeypatch.setattr("reprune.pruning.bounded_swaps.WIDTHS", widths)
        monkeypatch.setattr("reprune.pruning.bounded_swaps.KEPT_MINIMA", together % 2 + 1)
        monkeypatch.setattr("reprune.pruning.bounded_swaps.PRUNED_MINIMA", together % 2 + 1)
        monkeypatch.setattr("reprune.pruning.sparse_swaps.CHUNK_BYTES", chunk)
        refined = SparseSwaps(max_swaps=max_swaps).refine(layer, keep, pattern)
        assert torch.equal(refined, expected)


@EVERY_PATTERN
@pytest.mark.parametrize("seed", range(3))
def test_what_sparse_swaps_leaves_is_a_local_optimum(pattern_name: str, seed: int) -> None:
    """Catches rows that leave off too early: no single swap, tried on the data, lowers the loss of any row."""
    layer, inputs = _layer(5, 24, seed)
    removed = torch.rand(5, 24, generator=torch.Generator().manual_seed(seed)) < 0.1
    keep = _mask(layer, pattern_name) & ~removed
    layer = replace(layer, removed=removed)
    pattern, _ = PATTERNS[pattern_name]
    refined = SparseSwaps().refine(layer, keep, pattern)
    left = _loss(layer, inputs, refined)
    assert bool((left < _loss(layer, inputs, keep)).any())
    for row in range(5):
        for p, r in _swaps(refined, removed, row, pattern.columns):
            swapped = refined.clone()
            swapped[row, p], swapped[row, r] = False, True
            assert _loss(layer, inputs, swapped)[row] >= left[row] * (1 - 1e-5)


def test_no_row_makes_more_swaps_than_asked_for() -> None:
    """Catches `max_swaps` that counts for all rows together, or one swap too many."""
    layer, inputs = _layer(6, 32, seed=1)
    keep = _mask(layer, "unstructured")
    losses = []
    for max_swaps in (1, 3, 5):
        refined = SparseSwaps(max_swaps=max_swaps).refine(layer, keep, Unstructured())
        assert int((refined & ~keep).sum(dim=1).max()) == max_swaps
        losses.append(_loss(layer, inputs, refined).sum())
    assert losses == sorted(losses, reverse=True)


def test_a_large_tolerance_leaves_small_gains() -> None:
    """Catches a tolerance that is not relative to the row's present loss: what is made gains a tenth, what is left less."""
    layer, inputs = _layer(6, 32, seed=1)
    layer = replace(layer, weight=layer.weight * 1e-3)
    keep = _mask(layer, "unstructured")
    loss = _loss(layer, inputs, keep)
    for swaps in range(1, 30):
        refined = SparseSwaps(max_swaps=swaps, tolerance=0.1).refine(layer, keep, Unstructured())
        after = _loss(layer, inputs, refined)
        unchanged = loss == after
        assert bool((unchanged | (after < 0.9 * loss)).all())
        if bool(unchanged.all()):
            break
        loss = after
    assert bool(unchanged.all())
    gains = []
    for row in range(6):
        for p, r in _swaps(refined, None, row, None):
            swapped = refined.clone()
            swapped[row, p], swapped[row, r] = False, True
            gains.append(float(1 - _loss(layer, inputs, swapped)[row] / loss[row]))
    assert 0 < max(gains) <= 0.1


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_singular_gram(tokens: int) -> None:
    """Catches swaps back and forth on rounding where the right masks lose next to nothing, and a loss below zero."""
    stream = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, 40, generator=stream)
    layer = layer_context(torch.randn(40, 40, generator=stream), inputs)
    keep = _mask(layer, "unstructured")
    few, many = (
        SparseSwaps(max_swaps=swaps, tolerance=0).refine(layer, keep, Unstructured()) for swaps in (60, 61)
    )
    assert torch.equal(few, many)
    before, after = _loss(layer, inputs.double(), keep), _loss(layer, inputs.double(), few)
    assert after.sum() < 1e-3 * before.sum()
    assert bool((after <= before).all())


def _correlated(kind: str, tokens: int, columns: int, stream: torch.Generator) -> Tensor:
    """Inputs that are easy or hard for a bound on products of columns."""
    inputs = torch.randn(tokens, columns, generator=stream)
    if kind == "means":
        inputs += 3 * torch.randn(columns, generator=stream)
    elif kind == "twins":
        # Columns in the same and in the opposite direction, one of them dead.
        inputs[:, 1::4] = inputs[:, ::4]
        inputs[:, 2::4] = -2 * inputs[:, ::4]
        inputs[:, 3] = 0
    elif kind == "one_large_token":
        inputs[0] *= 30 * torch.rand(columns, generator=stream).square()
    return inputs


def _by_all_pairs(layer: LayerContext, keep: Tensor, swaps: int) -> tuple[Tensor, Tensor]:
    """The mask of every row after so many best swaps, by the table of all pairs in float64, and its least lead over the next."""
    gram, keep = layer.inputs.gram, keep.clone()
    assert gram is not None
    gram, lead = gram.double(), torch.full((len(keep),), inf, dtype=torch.float64)
    for row, weight in enumerate(layer.weight.double()):
        for _ in range(swaps):
            lost = weight.masked_fill(keep[row], 0)
            own, pull = weight.square() * gram.diagonal(), 2 * weight * (gram @ lost)
            change = (own + pull)[:, None] + own - pull - 2 * weight[:, None] * weight * gram
            change = change.masked_fill(~keep[row][:, None], inf).masked_fill(keep[row], inf)
            best, second = change.flatten().topk(2, largest=False).values.tolist()
            if best >= -1e-6 * float(lost @ gram @ lost):
                break
            lead[row] = min(float(lead[row]), (second - best) / float(own.max()))
            p, r = divmod(int(change.argmin()), len(weight))
            keep[row, p], keep[row, r] = False, True
    return keep, lead


@pytest.mark.parametrize("kind", ["independent", "means", "twins", "one_large_token"])
@pytest.mark.parametrize("tokens", [12, 400])
def test_the_bounds_hide_no_pair(kind: str, tokens: int) -> None:
    """Catches a bound that is not one: of columns alike, of weights that come back, of fewer tokens than columns."""
    stream = torch.Generator().manual_seed(tokens)
    layer = layer_context(
        torch.randn(12, 152, generator=stream), _correlated(kind, tokens, 152, stream) / tokens**0.5
    )
    keep = _mask(layer, "unstructured")
    expected, lead = _by_all_pairs(layer, keep, 25)
    # Where two swaps are worth the same, float32 may take the other one.
    clear = lead > 3e-6
    assert int(clear.sum()) >= 4
    assert int((expected & ~keep).sum()) > 12 * 4
    refined = SparseSwaps(max_swaps=25).refine(layer, keep, Unstructured())
    assert torch.equal(refined[clear], expected[clear])


@pytest.mark.parametrize("kind", ["independent", "means", "twins", "one_large_token"])
def test_products_stay_within_their_bounds(kind: str) -> None:
    """Catches a maximum over the wrong axis, a diagonal that counts, and a dead column that makes NaN."""
    stream = torch.Generator().manual_seed(0)
    inputs = _correlated(kind, 50, 1100, stream)
    inputs[:, 7] = 0
    gram = inputs.T @ inputs
    bounds = product_bounds(gram)
    products = gram.abs().fill_diagonal_(0)
    assert bool((products <= (bounds[:, None] * bounds).sqrt()).all())
    assert float(bounds[7]) == 0
    alone = product_bounds(torch.diag(gram.diagonal()))
    assert not alone.any()
    # No larger than the product of the norms: the bound everyone knows.
    assert bool((bounds <= 1.01 * gram.diagonal()).all())


def test_few_pairs_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search that tries most pairs where tokens are fewer than columns."""
    stream = torch.Generator().manual_seed(1)
    layer = layer_context(torch.randn(16, 512, generator=stream), torch.randn(64, 512, generator=stream))
    keep = _mask(layer, "unstructured")
    tried, swaps = 0, 0
    changes = AnyPair._changes

    def counting(search: AnyPair, p: Tensor, r: Tensor, *more: Tensor) -> Tensor:
        nonlocal tried
        tried += p.numel() * r.shape[1]
        return changes(search, p, r, *more)

    best = AnyPair.best

    def searching(search: AnyPair, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal swaps
        swaps += len(limit)
        return best(search, limit)

    monkeypatch.setattr(AnyPair, "_changes", counting)
    monkeypatch.setattr(AnyPair, "best", searching)
    SparseSwaps().refine(layer, keep, Unstructured())
    assert swaps > 16 * 20
    assert tried < swaps * 0.4 * 0.6 * 512**2 / 10


# --- DSnoT


def _dsnot(layer: LayerContext, inputs: Tensor, keep: Tensor, group: int, choices: DSnoT) -> Tensor:
    """The rule in plain loops, in float64 and from the inputs."""
    keep = keep.clone()
    mean, variance = inputs.mean(dim=0), inputs.var(dim=0, correction=0)
    norm = inputs.norm(dim=0)
    for row, weight in enumerate(layer.weight.double()):
        for _ in range(choices.cycles):
            error = float((weight * mean)[~keep[row]].sum())
            if choices.tokens * abs(error) <= choices.threshold:
                break
            sign = 1 if error > 0 else -1
            best, grown, pruned = -inf, -1, -1
            for r in range(len(weight)):
                barred = layer.removed is not None and bool(layer.removed[row, r])
                gain = float(sign * weight[r] * mean[r] / variance[r])
                leaving = [
                    (float(weight[p].abs() * norm[p]), p)
                    for p in range(len(weight))
                    if keep[row, p] and p // group == r // group and sign * weight[p] * mean[p] < 0
                ]
                if not keep[row, r] and not barred and leaving and gain > max(0, best):
                    best, grown, pruned = gain, r, min(leaving)[1]
            if grown < 0:
                break
            after = error - float(weight[grown] * mean[grown]) + float(weight[pruned] * mean[pruned])
            if abs(after) >= abs(error):
                break
            keep[row, grown], keep[row, pruned] = True, False
    return keep


@EVERY_PATTERN
@pytest.mark.parametrize("choices", [DSnoT(), DSnoT(cycles=2), DSnoT(threshold=1.0, tokens=3)], ids=str)
def test_dsnot_follows_its_rule(pattern_name: str, choices: DSnoT) -> None:
    """Catches a sign, the standard deviation for the variance, Wanda's highest, and pairs across groups."""
    layer, inputs = _layer(8, 24, seed=5)
    removed = torch.rand(8, 24, generator=torch.Generator().manual_seed(1)) < 0.1
    layer = replace(layer, removed=removed)
    keep = _mask(layer, pattern_name) & ~removed
    pattern, _ = PATTERNS[pattern_name]
    expected = _dsnot(layer, inputs, keep, pattern.columns or 24, choices)
    assert int((expected & ~keep).sum()) > 5
    assert torch.equal(choices.refine(layer, keep, pattern), expected)


def _of_moments(weight: list[float], mean: list[float], variance: list[float]) -> LayerContext:
    """A layer of one row whose inputs, a hundred of them, have these moments."""
    first, second = torch.tensor(mean), torch.tensor(variance)
    statistics = InputStatistics(100, 100 * first, 100 * (second + first.square()))
    return LayerContext("layer", 0, torch.tensor([weight]), statistics, torch.Generator())


def test_dsnot_by_hand() -> None:
    """Catches a rule that the loops above share with the code: one swap worked out on paper.

    W E[X] = (2, 2, 1, -1, -1, 3). Pruned are the first three, so ε = 5. Over variances (4, 1, 1) they give 0.5, 2 and 1:
    the second comes back. Of the kept ones the fourth and fifth lower ε when removed; ‖X‖² = 100 · (variance + mean²)
    is 500 and 200 there, with |W| = 0.5 and 1, so √(0.25 · 500) < √200 and the fourth goes. Then ε = 5 − 2 − 1 = 2. Next
    the third comes back and the fifth goes: ε = 2 − 1 − 1 = 0.
    """
    layer = _of_moments(
        [1.0, 1.0, 1.0, -0.5, 1.0, 1.0], [2.0, 2.0, 1.0, 2.0, -1.0, 3.0], [4.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    )
    keep = torch.tensor([[False, False, False, True, True, True]])
    once = DSnoT(cycles=1).refine(layer, keep, Unstructured())
    assert once.tolist() == [[False, True, False, False, True, True]]
    twice = DSnoT().refine(layer, keep, Unstructured())
    assert twice.tolist() == [[False, True, True, False, False, True]]
    assert torch.equal(DSnoT(threshold=2.0, tokens=1).refine(layer, keep, Unstructured()), once)
    assert torch.equal(DSnoT(threshold=2.0, tokens=2).refine(layer, keep, Unstructured()), twice)
    assert torch.equal(DSnoT(threshold=5.0, tokens=1).refine(layer, keep, Unstructured()), keep)


def test_an_overshoot_ends_a_row() -> None:
    """Catches a swap that turns ε = 1 into −3, which the paper's code would make and leave where it is the last."""
    layer = _of_moments([2.0, -1.0, -2.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    keep = torch.tensor([[False, False, True]])
    assert torch.equal(DSnoT().refine(layer, keep, Unstructured()), keep)


def test_constant_inputs_are_the_surest_ones() -> None:
    """Catches a division by a variance of zero, an order of infinities, and 0/0 for a dead input.

    The second and third never vary. Over rounding, a share of E[X²] = 16 and 1, W E[X] = 4 and 0.5 put the third first.
    """
    layer = _of_moments([1.0, 1.0, 0.5, -1.0, 5.0], [1.0, 4.0, 1.0, 1.0, 0.0], [0.1, 0.0, 0.0, 1.0, 0.0])
    keep = torch.tensor([[False, False, False, True, False]])
    refined = DSnoT(cycles=1).refine(layer, keep, Unstructured())
    assert refined.tolist() == [[False, False, True, False, False]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pattern_name=st.sampled_from(sorted(PATTERNS)),
    cycles=st.integers(1, 60),
    threshold=st.sampled_from([0.0, 0.1, 100.0]),
)
def test_dsnot_never_raises_the_error_it_lowers(
    seed: int, pattern_name: str, cycles: int, threshold: float
) -> None:
    """Catches a row that goes on when |ε| rises, and ends there because the cycles are up."""
    layer, inputs = _layer(6, 16, seed)
    keep = _mask(layer, pattern_name, seed)
    pattern, _ = PATTERNS[pattern_name]
    refined = DSnoT(cycles=cycles, threshold=threshold).refine(layer, keep, pattern)
    shares = layer.weight.double() * inputs.mean(dim=0)
    before = shares.masked_fill(keep, 0).sum(dim=1).abs()
    after = shares.masked_fill(refined, 0).sum(dim=1).abs()
    assert bool((after <= before + 1e-5 * shares.abs().sum(dim=1)).all())
    assert torch.equal(refined.sum(dim=1), keep.sum(dim=1))


# --- Every refinement


@EVERY_REFINEMENT
@EVERY_PATTERN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dead", [(), (0, 5, 6, 7, 31)], ids=["alive", "dead_columns"])
def test_counts_stay_and_nothing_given_is_changed(
    name: str, pattern_name: str, dtype: torch.dtype, dead: tuple[int, ...]
) -> None:
    """Catches a swap between rows or groups, one weight swapped twice, and a mask that is changed in place."""
    layer, _ = _layer(10, 32, seed=4, dead=dead, dtype=dtype)
    keep = _mask(layer, pattern_name)
    pattern, _ = PATTERNS[pattern_name]
    gram = layer.inputs.gram
    assert gram is not None
    before = [tensor.clone() for tensor in (layer.weight, keep, gram, layer.inputs.norm)]
    refinement: Refinement = option("refine", name)
    refined = refinement.refine(layer, keep, pattern)
    assert refined.dtype == torch.bool
    assert int((refined != keep).sum()) > 0
    group = pattern.columns or 32
    assert torch.equal(refined.reshape(-1, group).sum(dim=1), keep.reshape(-1, group).sum(dim=1))
    after = (layer.weight, keep, gram, layer.inputs.norm)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(refinement.refine(layer, keep, pattern), refined)


@EVERY_REFINEMENT
@EVERY_PATTERN
def test_what_is_removed_stays_removed(name: str, pattern_name: str) -> None:
    """Catches a weight that an earlier round removed and that a swap brings back, as it would without the bar."""
    layer, _ = _layer(10, 32, seed=6)
    keep = _mask(layer, pattern_name)
    pattern, _ = PATTERNS[pattern_name]
    refinement: Refinement = option("refine", name)
    removed = refinement.refine(layer, keep, pattern) & ~keep
    assert removed.any()
    barred = refinement.refine(replace(layer, removed=removed), keep, pattern)
    assert not (barred & removed).any()
    assert (barred & ~keep).any()
    everything = refinement.refine(replace(layer, removed=~keep), keep, pattern)
    assert torch.equal(everything, keep)


@EVERY_REFINEMENT
@EVERY_PATTERN
@pytest.mark.parametrize("value", [True, False])
def test_rows_with_nothing_to_swap(name: str, pattern_name: str, value: bool) -> None:
    """Catches a swap with the first column where a row keeps all or nothing, while its neighbours have swaps."""
    layer, _ = _layer(10, 32, seed=7)
    keep = _mask(layer, pattern_name)
    keep[3:6] = value
    pattern, _ = PATTERNS[pattern_name]
    refinement: Refinement = option("refine", name)
    refined = refinement.refine(layer, keep, pattern)
    assert torch.equal(refined[3:6], keep[3:6])
    assert not torch.equal(refined, keep)
    whole = torch.full_like(keep, value)
    assert torch.equal(refinement.refine(layer, whole, pattern), whole)


def test_a_dead_input_makes_room() -> None:
    """Catches a kept weight of a dead input that is taken for a valuable one."""
    layer, inputs = _layer(8, 16, seed=8, dead=(2, 9))
    keep = torch.zeros(8, 16, dtype=torch.bool)
    keep[:, [2, 9]] = True
    refined = SparseSwaps().refine(layer, keep, Unstructured())
    assert not refined[:, [2, 9]].any()
    assert bool((_loss(layer, inputs, refined) < _loss(layer, inputs, keep)).all())


@EVERY_REFINEMENT
def test_an_expert_without_tokens(name: str) -> None:
    """Catches NaN from statistics of no token: by weight alone, larger ones come back, or nothing changes."""
    stream = torch.Generator().manual_seed(0)
    statistics = InputStatistics.of_no_token(16, torch.device("cpu"), True)
    layer = LayerContext("expert", 0, torch.randn(4, 16, generator=stream), statistics, stream)
    keep = _mask(layer, "unstructured")
    refined = option("refine", name).refine(layer, keep, Unstructured())
    lost = [float(layer.weight[~mask].square().sum()) for mask in (keep, refined)]
    assert lost[1] <= lost[0]
    assert torch.equal(refined.sum(dim=1), keep.sum(dim=1))


@EVERY_REFINEMENT
def test_inputs_that_overflow_name_the_layer(name: str) -> None:
    """Catches swaps chosen from NaN."""
    weight, inputs = torch.randn(4, 8), torch.randn(20, 8)
    inputs[0, 3] = inf
    layer = layer_context(weight, inputs, block=2)
    keep = torch.ones(4, 8, dtype=torch.bool)
    keep[:, ::2] = False
    with pytest.raises(RunError, match="block 2, layer layer"):
        option("refine", name).refine(layer, keep, Unstructured())


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (SparseSwaps, "max_swaps", 0),
        (SparseSwaps, "tolerance", -1e-6),
        (DSnoT, "cycles", 0),
        (DSnoT, "threshold", -0.1),
        (DSnoT, "tokens", 0),
    ],
)
def test_arguments_out_of_range(kind: type, key: str, value: float) -> None:
    """Catches a value that makes a refinement do nothing without a word."""
    with pytest.raises(ConfigError, match=key):
        kind(**{key: value})


def test_none_is_the_run_without_a_refinement(tmp_path: Path) -> None:
    """Catches a grid whose point `none` is done again beside the plain run, and one that is the same as the others."""
    plain, none, swapped = (
        plan_of(tmp_path, *more) for more in ([], ["refine=none"], ["refine=sparse_swaps"])
    )
    assert plain.folder.path == none.folder.path
    assert plain.folder.path != swapped.folder.path


def test_what_stays_has_the_values_it_had_before() -> None:
    """Catches SparseGPT's updates, which belong to its own mask, under another one."""
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 32, generator=stream)
    inputs[:, 1:] += inputs[:, :-1]
    layer = layer_context(torch.randn(16, 32, generator=stream), inputs)
    pruned = SparseGPT().prune(layer, Unstructured(), 0.6)
    assert not torch.equal(pruned.weight, torch.where(pruned.keep, layer.weight, 0))
    found = refined(SparseSwaps(), layer, pruned, Unstructured())
    assert torch.equal(found.weight, torch.where(found.keep, layer.weight, 0))
    assert found.facts["swapped"] == int((found.keep & ~pruned.keep).sum()) > 0
