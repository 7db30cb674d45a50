"""ALPS against ADMM in float64 with plain solves, exact least squares, all supports of a row, and SparseGPT."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from math import comb
from statistics import median

import pytest
import torch
from torch import Tensor

from reprune.engine.statistics import InputStatistics
from reprune.errors import ConfigError, RunError
from reprune.pruning.alps import ALPS
from reprune.pruning.contract import LayerContext
from reprune.pruning.sparsegpt import SparseGPT
from reprune.reconstruction.solvers import exact
from reprune.sparsity.mixed_groups import MixedOfGroup
from reprune.sparsity.patterns import Group, KeptOfGroup, Pattern, Unstructured
from support import layer_context

PATTERNS: dict[str, tuple[Pattern, float]] = {
    "50": (Unstructured(), 0.5),
    "70": (Unstructured(), 0.7),
    "2to4": (KeptOfGroup(kept=2, group=4), 0.5),
    "mixed": (MixedOfGroup(kept=4, group=8), 3 / 8),
}
EVERY_PATTERN = pytest.mark.parametrize("pattern_name", PATTERNS)


def _data(rows: int, columns: int, seed: int, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs of unequal scales."""
    stream = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=stream) / columns**0.5 + 0.3
    scales = torch.pow(10, torch.rand(columns, generator=stream) - 0.5)
    inputs = torch.randn(tokens, columns, generator=stream) @ mixing * scales
    return torch.randn(rows, columns, generator=stream), inputs


def _hessian(inputs: Tensor, damp: float = 0.01) -> Tensor:
    """2/n XᵀX + λI, H_jj = 1 for dead features, float64."""
    hessian = 2 / len(inputs) * inputs.double().T @ inputs.double()
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def _objective(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    """‖WX − ŴX‖² + λ‖W − Ŵ‖², up to the scale of H."""
    change = found.double() - weight.double()
    return float(((change @ hessian) * change).sum())


def _admm(
    weight: Tensor, hessian: Tensor, pattern: Pattern, sparsity: float, rounds: int
) -> tuple[Tensor, list[float]]:
    """The paper's steps with the multiplier V and a linear solve each: the mask after `rounds` of three, and all ρ."""
    root = hessian.diagonal().sqrt()
    unit, dense = hessian / root / root[:, None], weight.double() * root
    identity = torch.eye(len(unit), dtype=torch.float64)

    def largest(point: Tensor) -> Tensor:
        return pattern.keep(point.square(), sparsity, Group.MATRIX)

    multiplier, keep, rhos = torch.zeros_like(dense), largest(dense), [0.1]
    before, sparse = keep, dense * keep
    kept = int(keep.sum())
    for _ in range(rounds):
        for _ in range(3):
            right = dense @ unit - multiplier + rhos[-1] * sparse
            full = torch.linalg.solve(unit + rhos[-1] * identity, right.T).T
            keep = largest(full + multiplier / rhos[-1])
            sparse = (full + multiplier / rhos[-1]) * keep
            multiplier = multiplier + rhos[-1] * (full - sparse)
        changed = int((before ^ keep).sum())
        if changed == 0:
            break
        before = keep
        rhos.append(rhos[-1] * (1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1))
    return keep, rhos


@EVERY_PATTERN
@pytest.mark.parametrize("rounds", [1, 2, 5, 100])
def test_the_support_is_that_of_the_papers_steps(pattern_name: str, rounds: int) -> None:
    """Catches a multiplier that is not rescaled with ρ, a ρ that grows at the wrong time, and a wrong eigenbasis."""
    weight, inputs = _data(60, 32, seed=1)
    pattern, sparsity = PATTERNS[pattern_name]
    keep, rhos = _admm(weight, _hessian(inputs), pattern, sparsity, rounds)
    pruned = ALPS(iterations=3 * rounds).prune(layer_context(weight, inputs), pattern, sparsity)
    assert torch.equal(pruned.keep, keep)
    assert pruned.facts["rho"] == pytest.approx(rhos[-1])
    assert rounds < 100 or pruned.facts["admm_iterations"] == 3 * len(rhos) < 300


def test_rho_grows_by_every_factor() -> None:
    """Catches data of the test above in which ρ always grows by the same factor, so that it would not see the others."""
    weight, inputs = _data(60, 32, seed=1)
    every = [_admm(weight, _hessian(inputs), *PATTERNS[name], 100)[1] for name in PATTERNS]
    assert {round(later / earlier, 6) for rhos in every for earlier, later in pairwise(rhos)} == {
        1.3,
        1.2,
        1.1,
    }


@EVERY_PATTERN
@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_its_weights_are_the_best_on_its_support(pattern_name: str, damp: float) -> None:
    """Catches weights left as ADMM has them, in the scaled units, or pulled to zero by the dampening."""
    weight, inputs = _data(24, 40, seed=2)
    pattern, sparsity = PATTERNS[pattern_name]
    pruned = ALPS(damp=damp).prune(layer_context(weight, inputs), pattern, sparsity)
    hessian = _hessian(inputs, damp)
    best = exact(hessian, weight.double() @ hessian, pruned.keep)
    least = _objective(weight, best, hessian)
    masked = _objective(weight, weight * pruned.keep, hessian)
    assert _objective(weight, pruned.weight, hessian) - least < 1e-4 * (masked - least)
    torch.testing.assert_close(pruned.weight.double(), best, rtol=2e-2, atol=2e-2)
    assert not pruned.weight[~pruned.keep].any()


@EVERY_PATTERN
@pytest.mark.parametrize("seed", range(4))
def test_it_leaves_less_than_sparsegpt(pattern_name: str, seed: int) -> None:
    """Catches a support that is no better than SparseGPT's: its own against SparseGPT's with the best weights on it."""
    weight, inputs = _data(24, 48, seed)
    layer = layer_context(weight, inputs)
    pattern, sparsity = PATTERNS[pattern_name]
    other = SparseGPT().prune(layer, pattern, sparsity)
    hessian = _hessian(inputs)
    at_best = exact(hessian, weight.double() @ hessian, other.keep)
    found = ALPS().prune(layer, pattern, sparsity).weight

    def error(pruned: Tensor) -> float:
        return float((inputs.double() @ (pruned.double() - weight.double()).T).square().sum())

    assert error(found) < 0.7 * error(other.weight)
    assert error(found) < error(at_best)


def _least_of_supports(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The objective of a row at the best weights on each of some supports, [supports]."""
    change = exact(hessian, (weight.double() @ hessian).expand(len(kept), -1), kept) - weight.double()
    return ((change @ hessian) * change).sum(dim=1)


@pytest.mark.parametrize(("columns", "kept"), [(6, 3), (10, 4)])
def test_a_row_against_all_its_supports(columns: int, kept: int) -> None:
    """Catches an iteration that ends far from the best of 20 or 210 supports, or where it began: a heuristic at work."""
    supports = torch.zeros(comb(columns, kept), columns, dtype=torch.bool)
    supports.scatter_(1, torch.tensor(list(combinations(range(columns), kept))), True)
    found, at_first = [], []
    for seed in range(30):
        stream = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=stream) / columns**0.5 + 0.3
        inputs = torch.randn(100, columns, generator=stream) @ mixing
        weight, hessian = torch.randn(1, columns, generator=stream), _hessian(inputs)
        best = _least_of_supports(weight, hessian, supports).min()
        largest = Unstructured().keep(weight.abs() * hessian.diagonal().sqrt(), 1 - kept / columns, Group.ROW)
        pruned = ALPS().prune(layer_context(weight, inputs), Unstructured(), 1 - kept / columns)
        assert int(pruned.keep.sum()) == kept
        found.append(_objective(weight, pruned.weight, hessian) / float(best))
        at_first.append(float(_least_of_supports(weight, hessian, largest) / best))
    assert min(found) > 1 - 1e-4
    assert median(found) < 1.2
    assert max(found) < 6
    assert sum(found) < 0.75 * sum(at_first)


def test_the_matrix_is_compared_as_a_whole() -> None:
    """Catches an equal share of every row: rows of small weights lose more, their total is the same."""
    weight, inputs = _data(16, 32, seed=3)
    weight[:8] *= 0.1
    keep = ALPS().prune(layer_context(weight, inputs), Unstructured(), 0.5).keep
    assert int(keep.sum()) == 256
    assert int(keep[:8].sum()) < 0.5 * int(keep[8:].sum())
    grouped = ALPS().prune(layer_context(weight, inputs), KeptOfGroup(kept=2, group=4), 0.5).keep
    assert bool((grouped.reshape(-1, 4).sum(dim=1) == 2).all())


@EVERY_PATTERN
def test_what_is_removed_stays_removed(pattern_name: str) -> None:
    """Catches a removed weight that comes back, and one that is not counted among those to remove."""
    weight, inputs = _data(16, 32, seed=4)
    removed = torch.zeros(16, 32, dtype=torch.bool)
    free = ALPS().prune(layer_context(weight, inputs), Unstructured(), 0.5).keep
    removed[:, ::8] = free[:, ::8]
    assert int(removed.sum()) > 20
    layer = replace(layer_context(weight, inputs), removed=removed)
    pattern, sparsity = PATTERNS[pattern_name]
    pruned = ALPS().prune(layer, pattern, sparsity)
    assert not (pruned.keep & removed).any()
    assert int((~pruned.keep).sum()) == round(16 * 32 * sparsity)


def test_nothing_to_remove_leaves_the_weights() -> None:
    """Catches an iteration that moves weights where all are kept."""
    weight, inputs = _data(8, 16, seed=5)
    pruned = ALPS().prune(layer_context(weight, inputs), Unstructured(), 0.0)
    torch.testing.assert_close(pruned.weight, weight, rtol=1e-5, atol=1e-5)
    assert bool(pruned.keep.all())


@EVERY_PATTERN
def test_dead_inputs_are_the_first_to_go(pattern_name: str) -> None:
    """Catches NaN from a zero on the diagonal, and dead inputs that take the place of others or change their weights."""
    weight, inputs = _data(16, 32, seed=6)
    dead = [0, 9, 18, 27]
    inputs[:, dead] = 0
    pattern, sparsity = PATTERNS[pattern_name]
    pruned = ALPS().prune(layer_context(weight, inputs), pattern, sparsity)
    assert not pruned.keep[:, dead].any()
    other = weight.clone()
    other[:, dead] *= 100
    again = ALPS().prune(layer_context(other, inputs), pattern, sparsity)
    assert torch.equal(again.keep, pruned.keep)
    torch.testing.assert_close(again.weight, pruned.weight)


def test_one_eigendecomposition_for_layers_that_share_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches statistics of q, k and v that are decomposed three times, and one result for two dampenings."""
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(len(matrix)) or eigh(matrix))
    weight, inputs = _data(8, 16, seed=7)
    layer = layer_context(weight, inputs)
    first = ALPS().prune(layer, Unstructured(), 0.5)
    second = ALPS().prune(replace(layer, weight=-weight), Unstructured(), 0.5)
    assert calls == [16]
    torch.testing.assert_close(second.weight, -first.weight)
    other = ALPS(damp=0.3).prune(layer, Unstructured(), 0.5)
    alone = ALPS(damp=0.3).prune(layer_context(weight, inputs), Unstructured(), 0.5)
    assert torch.equal(other.weight, alone.weight)
    assert not torch.equal(other.weight, first.weight)


def test_fewer_tokens_than_inputs() -> None:
    """Catches a singular Gram that ends in NaN: dampened as asked for, it needs no note."""
    weight, inputs = _data(8, 64, seed=8, tokens=20)
    pruned = ALPS().prune(layer_context(weight, inputs), Unstructured(), 0.5)
    assert list(pruned.notes) == []
    assert bool(torch.isfinite(pruned.weight).all())
    undamped = ALPS(damp=0.0).prune(layer_context(weight, inputs), Unstructured(), 0.5)
    assert "dampening 0.01" in undamped.notes[0]
    torch.testing.assert_close(undamped.weight, pruned.weight)


def _indefinite(off_diagonal: float) -> LayerContext:
    statistics = InputStatistics(
        num_tokens=2,
        sums=torch.zeros(2),
        sum_squares=torch.ones(2),
        gram=torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]]),
    )
    return LayerContext("q_proj", 4, torch.tensor([[1.0, 2.0], [3.0, -1.0]]), statistics, torch.Generator())


def test_a_gram_that_is_not_definite() -> None:
    """Catches dampening that grows without a word, and an error that does not say where."""
    pruned = ALPS().prune(_indefinite(1.5), Unstructured(), 0.5)
    assert ["dampening 0.1" in pruned.notes[0], "dampening 1" in pruned.notes[1]] == [True, True]
    with pytest.raises(RunError, match="block 4, layer q_proj"):
        ALPS().prune(_indefinite(3.0), Unstructured(), 0.5)


def test_inputs_that_overflow_name_the_layer() -> None:
    """Catches masks chosen from NaN."""
    weight, inputs = _data(8, 8, seed=0)
    inputs[0, 3] = torch.inf
    with pytest.raises(RunError, match="block 2, layer layer"):
        ALPS().prune(layer_context(weight, inputs, block=2), Unstructured(), 0.5)


def test_an_expert_without_tokens() -> None:
    """Catches NaN from statistics of no token: all but the largest weights go, the others are as they were."""
    weight, _ = _data(4, 16, seed=9)
    statistics = InputStatistics.of_no_token(16, torch.device("cpu"), True)
    layer = LayerContext("expert", 0, weight, statistics, torch.Generator())
    pruned = ALPS().prune(layer, Unstructured(), 0.5)
    torch.testing.assert_close(pruned.weight, weight * pruned.keep)
    least = weight.square().flatten().sort().values[:32].sum()
    assert weight[~pruned.keep].square().sum() < 1.1 * least


@pytest.mark.parametrize(
    ("key", "value"),
    [("rho", 0.0), ("damp", -0.01), ("iterations", 0), ("cg_iterations", 0), ("cg_tolerance", -1.0)],
)
def test_arguments_out_of_range(key: str, value: float) -> None:
    """Catches a ρ of zero, which divides by zero, and iterations that never begin."""
    with pytest.raises(ConfigError, match=key):
        ALPS(**{key: value})  # type: ignore[arg-type]
