"""Allocations against plain forward passes, sorts, spectra and linear programs of the same small model."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from conftest import MakeModel
from helpers import plan_of, run_tiny
from reprune.calibration.roles import Texts
from reprune.engine.activations import Stores
from reprune.engine.dense_pass import DensePass
from reprune.errors import ConfigError, RunError
from reprune.identity import canonical
from reprune.model import device
from reprune.model.loading import LoadedModel
from reprune.pipeline import run
from reprune.pruning.contract import LayerContext, Needs, Pruner, ScorePruner
from reprune.pruning.magnitude import Magnitude
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.sparsity import global_ranking
from reprune.sparsity.adapt_pruner import AdaptPruner
from reprune.sparsity.allocation import DenseBlock, Layers, ModelAllocation, Wanted
from reprune.sparsity.alpha_pruning import AlphaPruning, hill
from reprune.sparsity.balance import MOST, dense_in_proportion, scaled, shifted
from reprune.sparsity.cfsp import CFSP
from reprune.sparsity.depth_ramp import DepthRamp
from reprune.sparsity.erdos_renyi import ErdosRenyi
from reprune.sparsity.global_ranking import Global
from reprune.sparsity.layer_table import LayerTable
from reprune.sparsity.mixed_groups import MixedOfGroup
from reprune.sparsity.owl import OWL
from reprune.sparsity.patterns import Pattern, Unstructured
from reprune.sparsity.pq_index import PQIndex
from reprune.sparsity.sensitivity import Sensitivity, filled
from support import block_outputs, changed, load_tiny, option, options, random_text, some_texts, state_of

READ_MODEL = [
    name
    for name in options("allocation")
    if isinstance(option("allocation", name), ModelAllocation) and name != "global_units"
]
"""That of whole units, which keep a budget as nearly as they can, is tested with them."""
EVERY = pytest.mark.parametrize("allocation_name", READ_MODEL)
Shares = Mapping[str, float]


def _wanted(
    view: DensePass, pruner: Pruner, sparsities: Sequence[float] = (0.5,), validation: Sequence[str] = ()
) -> Wanted:
    return Wanted(view.layers, pruner, view.pattern, sparsities, validation)


def _texts() -> Texts:
    """Two mask texts of different lengths, so that a mean of means is another number."""
    mask = random_text("mask", num_sequences=5)
    more = random_text("more", num_sequences=2, length=7)
    choice = random_text("choice", "validation", num_sequences=3, length=10)
    return replace(some_texts(), mask=[mask, more], validation=[choice])


def _model(**choices: Any) -> LoadedModel:
    """Blocks that differ: later ones have heavier tails, and turn their input less."""
    model = load_tiny(**choices)
    stream = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for block, linears in enumerate(model.linears):
            for view in linears.values():
                noise = torch.randn(view.shape, generator=stream)
                noise = noise.sign() * noise.abs() ** (1 + block)
                view.write(noise / noise.std() * view.shape[1] ** -0.5 / (1 + block))
    return model


def _view(
    model: LoadedModel, pruner: Any = None, pattern: Pattern | None = None, texts: Texts | None = None
) -> DensePass:
    shapes = {
        f"{block}.{name}": view.shape for block, own in enumerate(model.linears) for name, view in own.items()
    }
    hidden = model.model.config.get_text_config().hidden_size
    stores = Stores(model.plan.dtype, hidden, Path("unused"), on_disk=False)
    chosen = texts or _texts()
    return DensePass(model, chosen, Layers(shapes), pruner or Wanda(), pattern or Unstructured(), stores, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRUNE_CACHE", str(tmp_path_factory.mktemp("models")))
        yield _model()


@pytest.fixture
def view(model: LoadedModel) -> DensePass:
    return _view(model)


def _weights(view: DensePass) -> dict[str, np.ndarray[Any, Any]]:
    return {
        f"{block}.{name}": own.weight.double().numpy()
        for block, linears in enumerate(view.model.linears)
        for name, own in linears.items()
    }


def _norms(view: DensePass) -> dict[str, np.ndarray[Any, Any]]:
    """‖X_j‖ of every layer over the mask texts, from hooks on the whole model."""
    squares = defaultdict[str, float](float)

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            squares[name] = squares[name] + inputs[0].double().reshape(-1, inputs[0].shape[-1]).square().sum(
                0
            )

        return hook

    handles = [
        own.module.register_forward_pre_hook(keep(f"{block}.{name}"))
        for block, linears in enumerate(view.model.linears)
        for name, own in linears.items()
    ]
    with torch.no_grad():
        for text in view.texts.mask:
            view.model.model(input_ids=text.tokens_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: found.sqrt().numpy() for name, found in squares.items()}  # type: ignore[attr-defined]


def _cosines(view: DensePass) -> list[list[float]]:
    """cos(x_in, x_out) of every token of the mask texts, by block, one by one."""
    found: list[list[float]] = [[] for _ in view.model.blocks]
    entered: list[Tensor] = []
    hook = view.model.blocks[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    for text in view.texts.mask:
        outputs = block_outputs(view.model, text.tokens_NT)
        for block, (one, other) in enumerate(pairwise([entered.pop(), *outputs])):
            for x, y in zip(one.double().flatten(0, 1), other.double().flatten(0, 1), strict=True):
                found[block].append(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
    hook.remove()
    return found


def _mean(shares: Shares, layers: Layers) -> float:
    total = sum(share * layers.num_weights[name] for name, share in shares.items())
    return total / sum(layers.num_weights.values())


def _of_blocks(shares: Shares, layers: Layers) -> list[float]:
    """The share of each block, which all of its layers must have."""
    found = [{shares[name] for name, own in layers.blocks.items() if own == block} for block in range(3)]
    assert all(len(own) == 1 for own in found)
    return [own.pop() for own in found]


# -- From wishes to shares --------------------------------------------------------------------------------------------

WISHES = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 10**6)), min_size=1, max_size=8)


@pytest.mark.parametrize("balance", [shifted, scaled])
@given(wishes=WISHES, sparsity=st.floats(0, 0.99))
def test_balance_keeps_the_budget_and_the_order(
    balance: Any, wishes: list[tuple[float, int]], sparsity: float
) -> None:
    """Catches clipping that is not made up for, wishes of zero that leave weights unpruned, and an order turned over."""
    wished = {str(place): round(wish, 3) for place, (wish, _) in enumerate(wishes)}
    counts = {str(place): count for place, (_, count) in enumerate(wishes)}
    found = balance(wished, counts, sparsity)
    assert list(found) == list(wished)
    assert all(0 <= share <= MOST for share in found.values())
    total = sum(found[name] * counts[name] for name in found) / sum(counts.values())
    assert total == pytest.approx(sparsity, abs=2e-6)
    ranked = sorted(found, key=lambda name: wished[name])
    assert all(found[low] <= found[high] + 1e-9 for low, high in pairwise(ranked))


def test_balance_changes_nothing_that_fits() -> None:
    """Catches a rebalancing of what keeps the budget as it is."""
    counts = {"a": 100, "b": 300}
    assert shifted({"a": 0.2, "b": 0.6}, counts, 0.5) == pytest.approx({"a": 0.2, "b": 0.6})
    assert scaled({"a": 1.0, "b": 3.0}, counts, 0.5) == pytest.approx({"a": 0.2, "b": 0.6})
    assert dense_in_proportion({"a": 4.0, "b": 2.0}, counts, 0.5) == pytest.approx({"a": 0.2, "b": 0.6})


def test_what_wishes_nothing_takes_only_what_the_others_cannot() -> None:
    """Catches a budget that is not met where a wish is zero."""
    counts = {"none": 100, "some": 100}
    assert scaled({"none": 0.0, "some": 0.5}, counts, 0.4) == pytest.approx({"none": 0.0, "some": 0.8})
    assert scaled({"none": 0.0, "some": 0.5}, counts, 0.6) == pytest.approx(
        {"none": 0.21, "some": 0.99}, abs=1e-5
    )
    assert scaled({"none": 0.0, "some": 0.0}, counts, 0.6) == pytest.approx({"none": 0.6, "some": 0.6})


# -- Of sizes alone ---------------------------------------------------------------------------------------------------


def test_erdos_renyi_solves_for_epsilon() -> None:
    """Catches densities in proportion to anything else, and a cap at 1 whose weights are not taken elsewhere."""
    layers = Layers({"0.small": (4, 4), "0.wide": (8, 128), "1.square": (64, 64)})
    for sparsity in (0.3, 0.9):
        found = ErdosRenyi().allocate(layers, sparsity)
        low, high = 0.0, 1e4
        for _ in range(200):
            epsilon = (low + high) / 2
            density = {n: min(1, epsilon * (o + i) / (o * i)) for n, (o, i) in layers.shapes.items()}
            kept = sum(density[n] * layers.num_weights[n] for n in density) / 5136
            low, high = (epsilon, high) if kept < 1 - sparsity else (low, epsilon)
        assert found == pytest.approx({name: 1 - own for name, own in density.items()}, abs=2e-6)
        assert (found["0.small"] == 0) == (sparsity == 0.3), "the cap is what the test is about"


@pytest.mark.parametrize(
    ("slope", "sparsity", "expected"),
    [
        (0.2, 0.5, [0.4, 0.5, 0.6]),
        (-0.2, 0.5, [0.6, 0.5, 0.4]),
        (0.0, 0.7, [0.7, 0.7, 0.7]),
        (0.6, 0.1, [0.0, 0.0, 0.3]),
        (0.3, 0.95, [0.87, 0.99, 0.99]),
    ],
)
def test_depth_ramp_by_hand(slope: float, sparsity: float, expected: list[float]) -> None:
    """Catches a slope per block instead of over all, and clipping that misses the budget; the first block is the fifth."""
    layers = Layers({f"{block}.layer": (10, 10) for block in (4, 5, 6)})
    found = DepthRamp(slope=slope).allocate(layers, sparsity)
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)


def test_depth_ramp_of_one_block() -> None:
    """Catches a division by the zero blocks between the first and the last."""
    assert DepthRamp().allocate(Layers({"3.a": (2, 3), "3.b": (5, 2)}), 0.4) == {"3.a": 0.4, "3.b": 0.4}


TABLED = Layers({"0.attn.q": (10, 10), "0.mlp.up": (10, 20), "1.attn.q": (10, 10), "10.mlp.up": (10, 20)})


def test_table_takes_the_first_match_and_the_rest_share_alike() -> None:
    """Catches a last match that wins, a pattern of block 1 that takes block 10, and a mean over layers."""
    table = {"0.*": 0.25, "*.mlp.*": 0.75, "1.*": 0.5}
    found = LayerTable(table=table).allocate(TABLED, 275 / 600)
    assert found == {"0.attn.q": 0.25, "0.mlp.up": 0.25, "1.attn.q": 0.5, "10.mlp.up": 0.75}
    found = LayerTable(table={"*.mlp.*": 0.7}).allocate(TABLED, 0.6)
    assert found == pytest.approx({"0.attn.q": 0.4, "0.mlp.up": 0.7, "1.attn.q": 0.4, "10.mlp.up": 0.7})


def test_no_table_is_uniform() -> None:
    """Catches an option that cannot be built without its table."""
    assert set(LayerTable().allocate(TABLED, 0.3).values()) == {0.3}
    assert set(LayerTable(table={}).allocate(TABLED, 0.3).values()) == {0.3}


@pytest.mark.parametrize(
    ("table", "sparsity", "accepted"),
    [
        ({"*.mlp.*": 0.9}, 0.5, "sparsity from 0.6 to below 0.933333"),
        ({"*.mlp.*": 0.1}, 0.5, "sparsity from 0.0666667 to below 0.4"),
        ({"*": 0.4}, 0.5, "sparsity=0.4"),
    ],
)
def test_table_without_room_for_the_budget(table: dict[str, float], sparsity: float, accepted: str) -> None:
    """Catches a sparsity that the table makes another one of without a word."""
    with pytest.raises(ConfigError) as caught:
        LayerTable(table=table).allocate(TABLED, sparsity)
    assert caught.value.key == "allocation.table"
    assert caught.value.accepted == accepted


def test_table_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    """Catches a pattern with a typing error that matches nothing, and a table that the command line cannot give."""
    plan = plan_of(tmp_path, "allocation=layers", "allocation.table={*.mlp.*: 0.6, 0.*: 0.4}", "sparsity=0.5")
    assert plan.rounds is not None
    assert plan.rounds[0]["0.mlp.up_proj"] == 0.6
    assert plan.rounds[0]["0.self_attn.q_proj"] == 0.4
    assert _mean(plan.rounds[0], plan.shapes.to_allocate) == pytest.approx(0.5)
    for bad, key, words in (
        ("{*.mpl.up_proj: 0.6}", "allocation.table", "did you mean '*.mlp.up_proj'?"),
        ("{*.mlp.*: 1.0}", "allocation.table.*.mlp.*", "0 ≤ sparsity < 1"),
        ("{*.mlp.*: 0.99}", "allocation.table", "cannot be met"),
        ("{*.mlp.*: much}", "allocation.table.*.mlp.*", "much"),
    ):
        with pytest.raises(ConfigError) as caught:
            plan_of(tmp_path, "allocation=layers", f"allocation.table={bad}", "sparsity=0.5")
        assert caught.value.key == key
        assert words in str(caught.value)


# -- Of the dense model -----------------------------------------------------------------------------------------------


def test_pq_index_of_weights_in_numpy(view: DensePass) -> None:
    """Catches norms with the wrong power of d, the exponents of another p and q, and η with the wrong sign."""
    for p, q, eta in ((0.5, 1.0, 0.0), (0.3, 2.0, 0.1)):
        wished = {}
        for name, weight in _weights(view).items():
            w, d = np.abs(weight), weight.size
            index = 1 - d ** (1 / q - 1 / p) * (w**p).sum() ** (1 / p) / (w**q).sum() ** (1 / q)
            kept = d * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))
            wished[name] = 1 - kept / d
        [found] = PQIndex(p=p, q=q, eta=eta).allocate_for(view, [0.2])
        factor = 0.2 / _mean(wished, view.layers)
        assert found == pytest.approx({name: factor * wish for name, wish in wished.items()}, rel=1e-4)
    assert max(found.values()) > 1.1 * min(found.values()), "the layers do not differ enough to tell"


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 3.0)])
def test_pq_index_asks_for_the_zeros_where_the_rest_are_equal(p: float, q: float, scale: float) -> None:
    """Catches an index that depends on the scale: with r equal weights of d the rule keeps r, whatever p and q."""
    allocation = PQIndex(p=p, q=q)
    weight = torch.zeros(8, 10)
    weight.view(-1)[:24] = scale * torch.tensor([1.0, -1.0]).repeat(12)
    assert allocation._removed(_context(weight)) == pytest.approx(0.7, abs=1e-5)
    assert allocation._removed(_context(torch.full((4, 4), scale))) == pytest.approx(0, abs=1e-6)
    assert allocation._removed(_context(torch.zeros(4, 4))) == 1


def _context(weight: Tensor) -> LayerContext:
    return LayerContext("layer", 2, weight, None, torch.Generator())


@pytest.mark.parametrize("sparsity", [0.03, 0.5, 0.97])
def test_owl_counts_outliers_of_the_whole_block(view: DensePass, sparsity: float) -> None:
    """Catches a mean by layer, norms of the wrong text, and blocks with outliers that lose more instead of less."""
    norms, shares = _norms(view), []
    for block in range(3):
        own = [np.abs(w) * norms[n] for n, w in _weights(view).items() if view.layers.blocks[n] == block]
        values = np.concatenate([matrix.ravel() for matrix in own])
        shares.append((values > 3 * values.mean()).mean())
    assert len(set(shares)) == 3
    kept = [2 * 0.08 * (share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    expected = [sparsity - (own - sum(kept) / 3) for own in kept]
    [found] = OWL(outlier=3.0).allocate_for(view, [sparsity])
    if sparsity == 0.5:
        assert _of_blocks(found, view.layers) == pytest.approx(expected, abs=1e-6)
    else:
        assert not 0 <= min(expected) <= max(expected) < 1, "clipping is what this is about"
        assert list(np.argsort(_of_blocks(found, view.layers))) == list(np.argsort(expected))
    assert _mean(found, view.layers) == pytest.approx(sparsity, abs=1e-6)


def test_owl_of_blocks_that_are_alike(view: DensePass) -> None:
    """Catches 0/0 where no block has outliers."""
    [found] = OWL(outlier=1e9).allocate_for(view, [0.5])
    assert set(found.values()) == {0.5}


def test_alpha_pruning_of_eigenvalues_in_numpy(view: DensePass) -> None:
    """Catches singular values where eigenvalues are meant, another tail, and heavier tails that are pruned more."""
    alphas = [[], [], []]  # type: list[list[float]]
    for name, weight in _weights(view).items():
        small = weight if weight.shape[0] <= weight.shape[1] else weight.T
        values = np.linalg.eigvalsh(small @ small.T)
        n, k = len(values), len(values) // 2
        # λ_i of the formula is values[i − 1].
        tail = sum(math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))
        alphas[view.layers.blocks[name]].append(1 + k / tail)
    means = [sum(own) / len(own) for own in alphas]
    mapped = [0.7 + 0.6 * (own - min(means)) / (max(means) - min(means)) for own in means]
    [found] = AlphaPruning().allocate_for(view, [0.5])
    expected = [0.5 * own / (sum(mapped) / 3) for own in mapped]
    assert _of_blocks(found, view.layers) == pytest.approx(expected, rel=1e-4)
    assert np.argmin(means) == 2, "the last block has the heaviest tails"
    assert np.argmin(expected) == 2


def test_alpha_of_a_power_law() -> None:
    """Catches an estimator that is off by one: the quantiles of a Pareto law give its exponent back."""
    quantiles = torch.linspace(0.0005, 0.9995, 1000).double()
    values = (1 - quantiles) ** (-1 / (3.5 - 1))
    assert hill(_context(torch.diag(values.sqrt()).float())) == pytest.approx(3.5, rel=0.02)


@pytest.mark.parametrize(
    "weight",
    [torch.eye(6), torch.zeros(5, 5), torch.ones(4, 6), torch.randn(1, 9)],
    ids=["eye", "zero", "rank1", "row"],
)
def test_alpha_of_a_matrix_without_a_tail_is_refused(weight: Tensor) -> None:
    """Catches NaN and infinity that become an allocation, and logarithms of what is zero but for rounding."""
    with pytest.raises(RunError, match=r"block 2, layer layer: .* no tail"):
        hill(_context(weight))


def test_alpha_of_a_singular_matrix_is_that_of_its_range() -> None:
    """Catches numerically zero eigenvalues that count as half of the spectrum."""
    thin = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(20, 16)
    whole[:, ::2] = thin
    rotated = whole @ torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    assert hill(_context(rotated)) == pytest.approx(hill(_context(thin)), rel=1e-4)


def test_cfsp_keeps_by_the_sigmoid_of_the_angle(view: DensePass) -> None:
    """Catches a sum over tokens, a mean over texts, a cosine for the angle, and turning blocks that lose more."""
    angles = [float(np.mean(np.arccos(own))) / math.pi for own in _cosines(view)]
    z = [1 / (1 + math.exp(-2.0 * (angle - sum(angles) / 3))) for angle in angles]
    [found] = CFSP(sharpness=2.0).allocate_for(view, [0.5])
    expected = [1 - 0.5 * own / (sum(z) / 3) for own in z]
    assert _of_blocks(found, view.layers) == pytest.approx(expected, abs=1e-5)
    assert max(expected) > 1.05 * min(expected), "the blocks do not differ enough to tell"
    [flat] = CFSP(sharpness=0.0).allocate_for(view, [0.5])
    assert list(flat.values()) == pytest.approx([0.5] * len(flat))
    [steep] = CFSP(sharpness=1e6).allocate_for(view, [0.5])
    assert _mean(steep, view.layers) == pytest.approx(0.5, abs=1e-6)


def test_adapt_pruner_is_linear_in_the_cosine(view: DensePass) -> None:
    """Catches importance with the wrong sign, and one that is not scaled to [−1, 1] about its mean."""
    importance = [-float(np.mean(own)) for own in _cosines(view)]
    centred = [own - sum(importance) / 3 for own in importance]
    expected = [0.5 - 0.3 * own / max(map(abs, centred)) for own in centred]
    [found] = AdaptPruner(amplitude=0.3).allocate_for(view, [0.5])
    assert _of_blocks(found, view.layers) == pytest.approx(expected, abs=1e-5)
    [clipped] = AdaptPruner(amplitude=0.9).allocate_for(view, [0.5])
    assert _mean(clipped, view.layers) == pytest.approx(0.5, abs=1e-6)
    assert 0 <= min(clipped.values()) < max(clipped.values()) < 1


# -- One ranking ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Given(ScorePruner):
    """Scores that a test gives, by layer."""

    scores: dict[str, Tensor]

    def score(self, layer: LayerContext) -> Tensor:
        return self.scores[f"{layer.block}.{layer.name}"]


def _ranked(
    scores: Mapping[str, np.ndarray[Any, Any]], sparsity: float, at_most: float = 1.0
) -> dict[str, float]:
    """Every score of the model in one list; from the lowest, each goes unless its layer has lost its most."""
    listed = sorted((float(value), name) for name, own in scores.items() for value in own.ravel())
    left, gone = round(sparsity * len(listed)), dict.fromkeys(scores, 0)
    for _, name in listed:
        if left and gone[name] < at_most * scores[name].size:
            gone[name] += 1
            left -= 1
    return {name: count / scores[name].size for name, count in gone.items()}


@pytest.mark.parametrize("own_score", [None, Magnitude()])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_global_is_one_sort_of_all_scores(view: DensePass, own_score: Any, sparsity: float) -> None:
    """Catches a threshold by layer, the run's pruner in place of the score, and counts that miss the budget."""
    norms = _norms(view)
    scores = {
        name: np.abs(weight) * (norms[name] if own_score is None else 1.0)
        for name, weight in _weights(view).items()
    }
    [found] = Global(score=own_score).allocate_for(view, [sparsity])
    # Norms differ in their last bits, and a cap cuts a weight in two.
    assert found == pytest.approx(_ranked(scores, sparsity, 0.95), abs=2.5 / 512)
    assert _mean(found, view.layers) == pytest.approx(sparsity, abs=1e-9)
    assert max(found.values()) > 1.2 * min(found.values())


def test_global_magnitude_is_exact(view: DensePass) -> None:
    """Catches a threshold that is off by one: float32 weights rank alike in both."""
    scores = {name: np.abs(weight) for name, weight in _weights(view).items()}
    num = sum(view.layers.num_weights.values())
    for sparsity in (0.0, 1 / num, 0.5, 0.9):
        sparsity = round(sparsity * num) / num
        [found] = Global(score=Magnitude(), at_most=0.9999).allocate_for(view, [sparsity])
        assert found == pytest.approx(_ranked(scores, sparsity), abs=1e-9)


@pytest.mark.parametrize("at_most", [0.6, 0.75])
def test_global_spares_a_layer_that_would_be_emptied(view: DensePass, at_most: float) -> None:
    """Catches a cap whose weights nobody else loses, and others that lose them out of rank."""
    scores = {name: np.abs(weight) for name, weight in _weights(view).items()}
    [found] = Global(score=Magnitude(), at_most=at_most).allocate_for(view, [0.5])
    assert max(_ranked(scores, 0.5).values()) > at_most, "the cap is what the test is about"
    assert found == pytest.approx(_ranked(scores, 0.5, at_most), abs=1 / 512)
    assert max(found.values()) <= at_most
    assert _mean(found, view.layers) == pytest.approx(0.5, abs=1e-9)


def test_global_of_a_large_model_is_near_to_it(view: DensePass, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bits left out at the wrong end, which the exact count of small models would hide."""
    scores = {name: np.abs(weight) for name, weight in _weights(view).items()}
    monkeypatch.setattr(global_ranking, "EXACT", 0)
    [found] = Global(score=Magnitude()).allocate_for(view, [0.6])
    assert found == pytest.approx(_ranked(scores, 0.6), abs=2e-3)
    assert _mean(found, view.layers) == pytest.approx(0.6, abs=1e-9)


def test_global_shares_equal_scores_in_proportion(view: DensePass) -> None:
    """Catches ties that the first layer takes, and −0 that ranks apart from 0."""
    scores = {name: torch.zeros(shape) for name, shape in view.layers.shapes.items()}
    first, *_, last = scores
    scores[first].neg_()
    scores[last].fill_(1.0)
    [found] = Global(score=_Given(scores=scores)).allocate_for(view, [0.5])
    assert found.pop(last) == 0
    assert len(set(found.values())) == 1


@pytest.mark.parametrize(("value", "words"), [(-1.0, "negative scores"), (math.nan, "not finite")])
def test_global_refuses_scores_that_have_no_rank(view: DensePass, value: float, words: str) -> None:
    """Catches bits of a negative float, which sort the wrong way round."""
    scores = {name: torch.ones(shape) for name, shape in view.layers.shapes.items()}
    scores["1.mlp.up_proj"][0, 0] = value
    with pytest.raises(RunError, match=f"block 1, layer mlp.up_proj: .*{words}"):
        Global(score=_Given(scores=scores)).allocate_for(view, [0.5])


@dataclass(kw_only=True)
class _Gradients(Magnitude):
    needs: ClassVar[Needs] = Needs(gradients=True)


@dataclass(kw_only=True)
class _BlockGradients(Magnitude):
    needs: ClassVar[Needs] = Needs(block_gradients=True)


def test_global_refuses_what_cannot_rank(view: DensePass) -> None:
    """Catches a pruner without a score, or with one that is not known yet, that fails in the middle of a run."""
    for pruner in (SparseGPT(), _BlockGradients()):
        with pytest.raises(ConfigError, match=r"allocation\.score") as caught:
            Global().check(_wanted(view, pruner))
        assert caught.value.hint == "allocation=global_magnitude"
        Global(score=Magnitude()).check(_wanted(view, pruner))
    with pytest.raises(ConfigError, match="no score to rank by"):
        Global(score=SparseGPT())  # type: ignore[arg-type]
    Global().check(_wanted(view, _Gradients()))
    with pytest.raises(ConfigError, match=r"another score than the run's"):
        Global(score=_Gradients()).check(_wanted(view, Magnitude()))
    with pytest.raises(ConfigError, match="at_most"):
        Global(at_most=0.4).check(_wanted(view, Magnitude()))


def test_global_rankings_by_different_scores_are_different_runs() -> None:
    """Catches a hash of the fields alone: magnitude and Wanda have none."""
    identities = [canonical(Global(score=score)) for score in (None, Magnitude(), Wanda())]
    assert len({json.dumps(identity) for identity in identities}) == 3


# -- What it costs, measured ------------------------------------------------------------------------------------------


def _best(
    curves: Mapping[str, Sequence[tuple[float, float]]], counts: Mapping[str, int], wanted: float | Shares
) -> float:
    """The least Σ e over mixtures of the measured points, by a linear program: with a mean, or with shares, given."""
    names, columns = list(curves), [(name, *point) for name, points in curves.items() for point in points]
    rows = [[float(own == name) for own, _, _ in columns] for name in names]
    bounds = [1.0] * len(names)
    if isinstance(wanted, Mapping):
        rows += [[x if own == name else 0.0 for own, x, _ in columns] for name in names]
        bounds += [wanted[name] for name in names]
    else:
        rows.append([x * counts[own] for own, x, _ in columns])
        bounds.append(wanted * sum(counts.values()))
    scale = max(abs(y) for _, _, y in columns) or 1.0
    solved = linprog([y / scale for _, _, y in columns], A_eq=rows, b_eq=bounds, method="highs")
    assert solved.status == 0, solved.message
    return float(solved.fun) * scale


ERRORS = st.lists(
    st.tuples(st.lists(st.floats(-0.1, 2), min_size=4, max_size=4), st.integers(1, 1000)),
    min_size=1,
    max_size=5,
)


@given(layers=ERRORS, sparsity=st.floats(0, 0.9))
def test_filling_is_the_optimum_of_a_linear_program(
    layers: list[tuple[list[float], int]], sparsity: float
) -> None:
    """Catches a hull with a corner too many, a slope by share instead of by weight, and a budget that is not met."""
    grid = [0.3, 0.5, 0.7, 0.9]
    curves = {
        str(place): [(0.0, 0.0), *zip(grid, errors, strict=True)] for place, (errors, _) in enumerate(layers)
    }
    counts = {str(place): count for place, (_, count) in enumerate(layers)}
    found = filled(curves, counts, sparsity)
    total = sum(found[name] * counts[name] for name in found) / sum(counts.values())
    assert total == pytest.approx(sparsity, abs=1e-9)
    inside = {name: min(share, 0.9) for name, share in found.items()}
    assert found == pytest.approx(inside)
    assert _best(curves, counts, inside) == pytest.approx(_best(curves, counts, sparsity), abs=1e-6)


def _curves(view: DensePass, grid: Sequence[float]) -> dict[str, list[tuple[float, float]]]:
    """Each layer pruned in the model itself: the relative error of its block's output, token by token."""
    found: dict[str, list[tuple[float, float]]] = {}
    [text] = view.texts.validation
    dense = block_outputs(view.model, text.tokens_NT)
    for visited in view.visit(norm=True, gram=True):
        for name, layer in visited.layers.items():
            own = view.model.linears[visited.index][layer.name]
            before = own.weight.clone()
            found[name] = [(0.0, 0.0)]
            for share in grid:
                own.write(view.pruner.prune(layer, view.pattern, share).weight)
                pruned = block_outputs(view.model, text.tokens_NT)[visited.index]
                own.write(before)
                target = dense[visited.index].double()
                off = (pruned.double() - target).square().sum(-1) / target.square().sum(-1)
                found[name].append((share, float(off.mean())))
    return found


@pytest.mark.parametrize(
    "pruner", [Wanda(), SparseGPT(block_size=16)], ids=lambda pruner: type(pruner).__name__
)
def test_sensitivity_spends_the_budget_where_it_costs_least(model: LoadedModel, pruner: Any) -> None:
    """Catches errors of another block, text or layer, and a budget that is spent where it costs more."""
    view = _view(model, pruner)
    curves = _curves(view, [0.3, 0.5, 0.7, 0.9])
    num_weights = view.layers.num_weights
    for sparsity, found in zip((0.4, 0.8), Sensitivity().allocate_for(view, [0.4, 0.8]), strict=True):
        assert _mean(found, view.layers) == pytest.approx(sparsity, abs=1e-9)
        cost, best = (_best(curves, num_weights, wanted) for wanted in (found, sparsity))
        assert cost == pytest.approx(best, rel=1e-4)
        even = _best(curves, num_weights, dict.fromkeys(found, sparsity))
        assert best < 0.9 * even, "the layers do not differ enough to tell"


def test_sensitivity_keeps_to_whole_counts_of_a_group(model: LoadedModel) -> None:
    """Catches shares that N:M cannot hold, and a group that is emptied by rounding up."""
    pattern = MixedOfGroup(kept=2, group=4)
    view = _view(model, Magnitude(), pattern)
    [found] = Sensitivity().allocate_for(view, [0.5])
    curves = _curves(view, [0.25, 0.5, 0.75])
    best = _best(curves, view.layers.num_weights, 0.5)
    assert _best(curves, view.layers.num_weights, found) == pytest.approx(best, rel=1e-4)
    assert max(found.values()) <= 0.75
    settled = pattern.settle(found, view.layers.num_weights)
    assert all(share * 4 == int(share * 4) for share in settled.values())


def test_sensitivity_says_what_it_lacks(view: DensePass, tmp_path: Path) -> None:
    """Catches probes that choices are made on, and a pruner or a grid that fails in the middle of a run."""
    with pytest.raises(ConfigError, match="validation text") as caught:
        plan_of(tmp_path, "allocation=sensitivity")
    assert caught.value.key == "allocation"
    assert caught.value.hint == "+calibration@validation.choice=web"
    with pytest.raises(ConfigError, match="needs gradients of blocks"):
        Sensitivity().check(_wanted(view, _BlockGradients(), validation=["choice"]))
    Sensitivity().check(_wanted(view, _Gradients(), validation=["choice"]))
    Sensitivity().check(_wanted(view, Wanda(), validation=["choice"]))
    with pytest.raises(ConfigError, match="go as a whole"):
        plan_of(tmp_path, "allocation=sensitivity", "pattern=structured", "pruner=wanda")
    with pytest.raises(ConfigError, match=r"allocation\.grid"):
        Sensitivity(grid=[0.3, 0.6]).check(_wanted(view, Wanda(), [0.3, 0.7], ["choice"]))


# -- All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (lambda: DepthRamp(slope=1.5), "slope"),
        (lambda: PQIndex(p=1.0, q=1.0), "q"),
        (lambda: PQIndex(p=0.0), "p"),
        (lambda: PQIndex(eta=-0.1), "eta"),
        (lambda: OWL(outlier=0.0), "outlier"),
        (lambda: OWL(strength=-0.1), "strength"),
        (lambda: AlphaPruning(epsilon=1.0), "epsilon"),
        (lambda: CFSP(sharpness=-1.0), "sharpness"),
        (lambda: AdaptPruner(amplitude=math.nan), "amplitude"),
        (lambda: Global(at_most=1.0), "at_most"),
        (lambda: Sensitivity(grid=[]), "grid"),
        (lambda: Sensitivity(grid=[0.5, 1.0]), "grid"),
    ],
)
def test_arguments_out_of_range(made: Any, key: str) -> None:
    """Catches a number that gives nonsense hours later."""
    with pytest.raises(ConfigError) as caught:
        made()
    assert caught.value.key == key


@dataclass(frozen=True)
class _Counted:
    """A view that counts its visits."""

    inner: DensePass
    visits: list[dict[str, bool]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def visit(self, **asked: bool) -> Iterator[DenseBlock]:
        self.visits.append(asked)
        return self.inner.visit(**asked)


STEPS = [0.2, 0.5, 0.6, 0.9]


@EVERY
def test_rounds_of_a_schedule_share_one_visit(view: DensePass, allocation_name: str) -> None:
    """Catches a pass over the model for every round, a round that undoes the one before, and a model left changed."""
    allocation = option("allocation", allocation_name)
    before, counted = state_of(view.model.model), _Counted(view)
    rounds = allocation.allocate_for(counted, STEPS)
    assert len(counted.visits) == 1
    assert not changed(before, view.model.model)
    for step, shares in zip(STEPS, rounds, strict=True):
        assert list(shares) == list(view.layers.shapes)
        assert all(type(share) is float for share in shares.values())
        assert all(0 <= share < 1 for share in shares.values())
        assert _mean(shares, view.layers) == pytest.approx(step, abs=1e-6)
        assert allocation.allocate_for(view, [step]) == [shares]
    assert all(one[name] <= other[name] + 1e-9 for one, other in pairwise(rounds) for name in one)


@EVERY
def test_batches_do_not_matter(
    view: DensePass, allocation_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mean over batches, or a result that depends on how many sequences go through at once."""
    allocation = option("allocation", allocation_name)
    [together] = allocation.allocate_for(view, [0.5])
    monkeypatch.setitem(device.TOKENS_A_PASS, "cpu", 12)
    assert view.model.plan.sequences_a_pass(12) == 1
    [alone] = allocation.allocate_for(view, [0.5])
    assert alone == pytest.approx(together, abs=2 / 512)


@EVERY
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_other_layouts_and_dtypes(make_model: MakeModel, allocation_name: str, architecture: str) -> None:
    """Catches a weight that is stored transposed and read as it lies, experts, and half precision that overflows."""
    model = make_model(architecture, num_blocks=2, dtype="bfloat16")
    view = _view(model)
    [shares] = option("allocation", allocation_name).allocate_for(view, [0.5])
    assert list(shares) == list(view.layers.shapes)
    assert _mean(shares, view.layers) == pytest.approx(0.5, abs=1e-6)


@EVERY
def test_only_the_layers_that_are_pruned_count(view: DensePass, allocation_name: str) -> None:
    """Catches a mean over blocks that are not pruned, and shares for layers that nobody asked for."""
    own = {name: shape for name, shape in view.layers.shapes.items() if name.startswith(("0.mlp", "2.mlp"))}
    some = replace(view, layers=Layers(own))
    [shares] = option("allocation", allocation_name).allocate_for(some, [0.5])
    assert list(shares) == list(own)
    assert _mean(shares, some.layers) == pytest.approx(0.5, abs=1e-6)
    assert len(set(shares.values())) > 1


CHOICE = (
    "+calibration@validation.choice=vocabulary",
    "validation.choice.num_sequences=2",
    "validation.choice.length=16",
)


@EVERY
def test_run_prunes_as_it_was_allocated(
    tmp_path: Path, allocation_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that prunes by other shares than it measured, and one that goes on and measures anew."""
    choices = [
        f"allocation={allocation_name}",
        "pruner=magnitude",
        "reconstruction=none",
        "sparsity=0.6",
        *CHOICE,
    ]
    plan = plan_of(tmp_path, *choices)
    assert plan.rounds is None

    def stop(windows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, stop)
    file = plan.folder.path / "allocation.json"
    kept = file.read_bytes()

    def again(*arguments: Any) -> None:
        raise AssertionError("measured anew")

    monkeypatch.setattr(type(plan.allocation), "allocate_for", again)
    _, result = run_tiny(tmp_path, *choices)
    assert file.read_bytes() == kept
    [shares] = json.loads(kept)["rounds"]
    measured = result["sparsity"]["layers"]
    num_weights = plan.shapes.num_weights
    assert set(measured) == set(shares) == set(num_weights)
    assert all(abs(measured[name] - shares[name]) <= 0.5001 / num_weights[name] for name in shares)
    assert result["sparsity"]["total"] == pytest.approx(0.6, abs=1e-3)
    assert len(set(shares.values())) > 1


def test_iterative_run_with_an_allocation_of_its_own(tmp_path: Path) -> None:
    """Catches shares of the last round in every round."""
    choices = [
        "allocation=owl",
        "schedule=iterative",
        "schedule.rounds=2",
        "pruner=magnitude",
        "reconstruction=none",
    ]
    plan, result = run_tiny(tmp_path, *choices, "allocation.outlier=1.5", "sparsity=0.5")
    rounds = json.loads((plan.folder.path / "allocation.json").read_text(encoding="utf-8"))["rounds"]
    layers = plan.shapes.to_allocate
    assert [_mean(shares, layers) for shares in rounds] == pytest.approx(plan.steps, abs=1e-6)
    assert result["sparsity"]["layers"] == pytest.approx(rounds[-1], abs=1e-3)


def test_mixed_groups_take_an_allocation(tmp_path: Path) -> None:
    """Catches counts of groups that the run does not keep to."""
    choices = [
        "allocation=depth_ramp",
        "allocation.slope=0.5",
        "pattern=mixed_of_8",
        "pruner=wanda",
        "reconstruction=none",
    ]
    _, result = run_tiny(tmp_path, *choices, "sparsity=0.5")
    measured = result["sparsity"]["layers"]
    assert {name.split(".")[0]: share for name, share in measured.items()} == {"0": 0.25, "1": 0.5, "2": 0.75}


@pytest.mark.parametrize("allocation_name", [name for name in options("allocation") if name != "uniform"])
def test_a_pattern_with_one_sparsity_is_refused(tmp_path: Path, allocation_name: str) -> None:
    """Catches an allocation that is asked for and does nothing."""
    with pytest.raises(ConfigError, match="nothing to allocate"):
        plan_of(tmp_path, f"allocation={allocation_name}", "pattern=2to4", "pruner=wanda", *CHOICE)
