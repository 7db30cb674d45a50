"""SparseGPT against column-sequential OBS by brute force: trailing Hessians inverted anew at every column."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reprune.engine.statistics import InputStatistics
from reprune.errors import ConfigError, RunError
from reprune.pruning.contract import LayerContext
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.together import pruned_in_turn
from reprune.sparsity.patterns import KeptOfGroup, Unstructured
from support import layer_context

ROWS = 6


def _data(columns: int, seed: int, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, so that updates matter."""
    stream = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=stream) / columns**0.5 + 0.3
    inputs = torch.randn(tokens, columns, generator=stream) @ mixing
    return torch.randn(ROWS, columns, generator=stream), inputs


def _hessian(inputs: Tensor, damp: float) -> Tensor:
    hessian = 2 / len(inputs) * inputs.double().T @ inputs.double()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def _obs(
    weight: Tensor, hessian: Tensor, *, block: int, sparsity: float = 0.5, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Column after column: e = w/[H⁻¹_{≥j}]_jj, columns ≥ j get −e·[H⁻¹_{≥j}]_{j,:}; float64 [rows, columns]."""
    weight = weight.double().clone()
    rows, columns = weight.shape
    keep = torch.ones(rows, columns, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        if nm is None and j % block == 0:
            stop = min(j + block, columns)
            scores = weight[:, j:stop].square() / pivots[j:stop]
            removed = int(scores.numel() * sparsity + 0.5)
            flat = torch.ones(scores.numel(), dtype=torch.bool)
            flat[scores.flatten().argsort()[:removed]] = False
            keep[:, j:stop] = flat.reshape(scores.shape)
        if nm is not None and j % nm[1] == 0:
            kept, group = nm
            scores = weight[:, j : j + group].square() / pivots[j : j + group]
            keep[:, j : j + group] = False
            keep[:, j : j + group].scatter_(1, scores.topk(kept, dim=1).indices, True)
        error = torch.where(keep[:, j], 0, weight[:, j] / pivots[j])
        weight[:, j:] -= error[:, None] * inverses[j][0][None, :]
        weight[~keep[:, j], j] = 0
    return weight, keep


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("columns", "block"), [(8, 8), (24, 8), (20, 8), (40, 40), (40, 36), (48, 128), (37, 16), (33, 1)]
)
def test_unstructured_is_column_sequential_obs(columns: int, block: int, seed: int) -> None:
    """Catches masks from the wrong columns, lazy updates that miss a column, and widths that blocks do not divide."""
    weight, inputs = _data(columns, seed)
    expected, keep = _obs(weight, _hessian(inputs, 0.01), block=block)
    pruned = SparseGPT(block_size=block).prune(layer_context(weight, inputs), Unstructured(), 0.5)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=2e-3, atol=2e-4)
    assert not pruned.weight[~keep].any()


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize(("columns", "block"), [(24, 8), (40, 32), (48, 128), (56, 24)])
def test_n_of_m_is_decided_from_updated_weights(nm: tuple[int, int], columns: int, block: int) -> None:
    """Catches a mask chosen at the block's start or from the dense weights, and n that counts removed weights."""
    weight, inputs = _data(columns, seed=5)
    hessian = _hessian(inputs, 0.01)
    expected, keep = _obs(weight, hessian, block=block, nm=nm)
    pattern = KeptOfGroup(kept=nm[0], group=nm[1])
    pruned = SparseGPT(block_size=block).prune(layer_context(weight, inputs), pattern, 1 - nm[0] / nm[1])
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=2e-3, atol=2e-4)
    pivots = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    early = (weight.double().square() / pivots).reshape(ROWS, -1, nm[1]).topk(nm[0]).indices
    chosen = torch.zeros(ROWS, columns // nm[1], nm[1], dtype=torch.bool).scatter_(2, early, True)
    assert not torch.equal(keep, chosen.reshape(ROWS, columns)), "the data do not tell the two choices apart"


@pytest.mark.parametrize("damp", [0.0, 0.1, 1.0])
def test_dampening_is_relative_to_the_mean_diagonal(damp: float) -> None:
    """Catches dampening added as an absolute number, or to the sum instead of the mean."""
    weight, inputs = _data(16, seed=9)
    inputs = inputs * 30
    expected, keep = _obs(weight, _hessian(inputs, damp), block=16)
    pruned = SparseGPT(damp=damp).prune(layer_context(weight, inputs), Unstructured(), 0.5)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=2e-3, atol=2e-4)


def test_it_leaves_less_error_than_its_mask_alone() -> None:
    """Catches an update with the wrong sign, which a test of masks would not see."""
    weight, inputs = _data(32, seed=3)
    pruned = SparseGPT().prune(layer_context(weight, inputs), Unstructured(), 0.5)
    updated = (inputs @ (pruned.weight - weight).T).square().sum()
    masked = (inputs @ (weight * pruned.keep - weight).T).square().sum()
    assert updated < 0.7 * masked


@pytest.mark.parametrize("pattern", [Unstructured(), KeptOfGroup(kept=2, group=4)])
def test_dead_columns_are_zero_and_leave_the_rest_alone(pattern: Unstructured | KeptOfGroup) -> None:
    """Catches NaN from a zero on the Hessian's diagonal, and dead columns that keep their weights."""
    weight, inputs = _data(24, seed=11)
    dead = [0, 5, 6, 23]
    inputs[:, dead] = 0
    pruned = SparseGPT(block_size=8).prune(layer_context(weight, inputs), pattern, 0.5)
    assert not pruned.weight[:, dead].any()
    assert int(pruned.keep.sum()) == weight.numel() // 2
    cleared = weight.clone()
    cleared[:, dead] = 0
    nm = None if isinstance(pattern, Unstructured) else (2, 4)
    expected, _ = _obs(cleared, _hessian(inputs, 0.01), block=8, nm=nm)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=2e-3, atol=2e-4)


def _indefinite(off_diagonal: float) -> LayerContext:
    statistics = InputStatistics(
        num_tokens=2,
        sum_squares=torch.ones(2),
        gram=torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]]),
    )
    return LayerContext("q_proj", 4, torch.tensor([[1.0, 2.0], [3.0, -1.0]]), statistics, torch.Generator())


def test_a_failed_factorisation_is_tried_again_and_noted() -> None:
    """Catches the identity as a stand-in for the Hessian, and dampening that grows without a word."""
    layer = _indefinite(1.5)
    pruned = SparseGPT(damp=0.01).prune(layer, Unstructured(), 0.5)
    assert len(pruned.notes) == 2
    assert "dampening 0.1" in pruned.notes[0]
    assert "dampening 1" in pruned.notes[1]
    expected, keep = _obs(layer.weight, torch.tensor([[2.0, 1.5], [1.5, 2.0]]).double(), block=2)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, expected.float())


def test_a_hopeless_hessian_names_the_layer() -> None:
    """Catches an endless loop of retries, and an error that does not say where."""
    with pytest.raises(RunError, match="block 4, layer q_proj"):
        SparseGPT().prune(_indefinite(3.0), Unstructured(), 0.5)


def test_inputs_that_overflow_name_the_layer() -> None:
    """Catches masks chosen from NaN."""
    weight, inputs = _data(8, seed=0)
    inputs[0, 3] = torch.inf
    with pytest.raises(RunError, match="block 2, layer layer"):
        SparseGPT().prune(layer_context(weight, inputs, block=2), Unstructured(), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored_transposed", [False, True])
def test_the_given_weight_is_not_changed(dtype: torch.dtype, stored_transposed: bool) -> None:
    """Catches an update in place; with GPT-2's transposed storage a transpose makes no copy."""
    weight, inputs = _data(16, seed=1)
    weight = weight.to(dtype)
    if stored_transposed:
        weight = weight.T.contiguous().T
    before = weight.clone()
    SparseGPT(block_size=8).prune(layer_context(weight, inputs), Unstructured(), 0.5)
    assert torch.equal(weight, before)


def test_block_size_must_hold_whole_groups() -> None:
    """Catches groups that a block boundary cuts in two."""
    weight, inputs = _data(24, seed=1)
    with pytest.raises(ConfigError, match="block_size"):
        SparseGPT(block_size=6).prune(layer_context(weight, inputs), KeptOfGroup(kept=2, group=4), 0.5)


@pytest.mark.parametrize("pattern", [Unstructured(), KeptOfGroup(kept=2, group=4)])
def test_layers_with_one_input_are_pruned_as_if_alone(pattern: Unstructured | KeptOfGroup) -> None:
    """Catches masks chosen over the rows of several layers, one sparsity for all, and rows that end in another layer."""
    weight, inputs = _data(40, seed=21)
    first = layer_context(weight, inputs)
    removed = torch.zeros(2 * ROWS, 40, dtype=torch.bool)
    removed[:, 3] = True
    second = replace(first, name="other", weight=torch.cat([3 * weight.flip(0), weight]), removed=removed)
    third = replace(first, name="third", weight=-0.1 * weight)
    shares = [0.25, 0.5, 0.75] if isinstance(pattern, Unstructured) else [0.25, 0.5, 0.5]
    layers = {layer.name: layer for layer in (first, second, third)}
    together = dict(zip(layers, SparseGPT(block_size=16).prune_together(list(layers.values()), pattern, shares), strict=True))  # fmt: skip
    for (name, layer), share in zip(layers.items(), shares, strict=True):
        alone = SparseGPT(block_size=16).prune(layer, pattern, share)
        assert torch.equal(together[name].keep, alone.keep)
        torch.testing.assert_close(together[name].weight, alone.weight, rtol=1e-4, atol=1e-5)
    assert not together["other"].keep[:, 3].any()


def test_only_layers_with_one_input_meet() -> None:
    """Catches layers that are swept by another layer's Hessian, and a layer that is lost or pruned twice."""
    weight, inputs = _data(24, seed=2)
    shared, other = layer_context(weight, inputs), layer_context(weight, inputs[:, torch.arange(23, -1, -1)])
    layers = {"q": shared, "o": other, "k": replace(shared, weight=2 * weight)}
    shares = {"q": 0.5, "o": 0.5, "k": 0.25}
    found = list(pruned_in_turn(SparseGPT(), layers, Unstructured(), shares))
    assert sorted(name for name, _, _ in found) == ["k", "o", "q"]
    for name, pruned, _ in found:
        alone = SparseGPT().prune(layers[name], Unstructured(), shares[name])
        assert torch.equal(pruned.keep, alone.keep)
        torch.testing.assert_close(pruned.weight, alone.weight, rtol=1e-4, atol=1e-5)
