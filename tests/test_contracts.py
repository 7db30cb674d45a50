"""Contracts of the groups in conf/: a new YAML is tested the moment it exists."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reprune.cache import cache_root
from reprune.pruning.contract import LayerContext, LayerShape, Pruned, Pruner, UnitPruner
from reprune.sparsity.allocation import Layers, SizeAllocation
from reprune.sparsity.patterns import Group, Pattern
from reprune.tensor_files import write_tensors
from support import layer_context, option, options

ROWS, COLUMNS = 8, 160
DEAD = [0, 1, 70, 159]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

GIVEN = {"mask": {"path": "mask.safetensors"}}
"""Keys that have to be set, by pruner."""

LAYER_PRUNERS = [
    name
    for name in options("pruner")
    if not isinstance(option("pruner", name, **GIVEN.get(name, {})), UnitPruner)
]
"""Those of whole units, which no layer has alone, are tested as a block is pruned."""
EVERY_PRUNER = pytest.mark.parametrize("pruner_name", LAYER_PRUNERS)
EVERY_PATTERN = pytest.mark.parametrize("pattern_name", options("pattern"))


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What methods keep in the cache stays out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _layer(
    dtype: torch.dtype = torch.float32, *, dead: bool = False, transposed: bool = False
) -> LayerContext:
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, COLUMNS, generator=stream)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    if dead:
        inputs[:, DEAD] = 0
    weight = torch.randn(ROWS, COLUMNS, generator=stream).to(dtype)
    return layer_context(weight.T.contiguous().T if transposed else weight, inputs.to(dtype))


def _prune(pruner_name: str, pattern_name: str, layer: LayerContext, sparsity: float | None = None) -> Pruned:
    """With a pruner built anew, so that nothing is carried over from another layer."""
    pattern = option("pattern", pattern_name)
    sparsity = pattern.resolve(sparsity)
    given = {key: str(_mask_file(pattern, sparsity)) for key in GIVEN.get(pruner_name, {})}
    pruner: Pruner = option("pruner", pruner_name, **given)
    pruner.brings({"0.layer": LayerShape((ROWS, COLUMNS))}, pattern, ["0.layer"])
    return pruner.prune(layer, pattern, sparsity)


def _mask_file(pattern: Pattern, sparsity: float) -> Path:
    """A mask of the pattern at that sparsity, for the methods that bring one."""
    path = cache_root() / "mask.safetensors"
    scores = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    write_tensors(path, {"0.layer": pattern.keep(scores, sparsity, Group.MATRIX)})
    return path


def _check(pruned: Pruned, layer: LayerContext, pruner_name: str, pattern_name: str, sparsity: float) -> None:
    """The exact count, zero where not kept, finite elsewhere, dtype and shape as they came."""
    keep, weight = pruned.keep, pruned.weight
    assert keep.dtype == torch.bool
    assert keep.shape == weight.shape == layer.weight.shape
    assert weight.dtype == layer.weight.dtype
    assert bool(torch.isfinite(weight).all())
    assert not weight[~keep].any()
    if not option("pruner", pruner_name, **GIVEN.get(pruner_name, {})).needs.prunes:
        assert bool(keep.all())
        assert torch.equal(weight, layer.weight)
        return
    assert int((~keep).sum()) == round(keep.numel() * sparsity)
    columns = option("pattern", pattern_name).columns
    if columns is not None:
        removed = (~keep).reshape(-1, columns).sum(dim=1)
        assert (removed == round(columns * sparsity)).all()


@EVERY_PRUNER
@EVERY_PATTERN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead_columns"])
def test_exact_count_finite_survivors_dtype_kept(
    pruner_name: str, pattern_name: str, dtype: torch.dtype, dead: bool
) -> None:
    """Catches thresholds with ties, NaN from dead inputs, and float32 that leaks into a half-precision model."""
    layer = _layer(dtype, dead=dead)
    pruned = _prune(pruner_name, pattern_name, layer)
    _check(pruned, layer, pruner_name, pattern_name, option("pattern", pattern_name).resolve(None))


@EVERY_PRUNER
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.75])
def test_unstructured_at_other_sparsities(pruner_name: str, sparsity: float) -> None:
    """Catches a method that prunes half whatever it is asked for."""
    layer = _layer()
    pruned = _prune(pruner_name, "unstructured", layer, sparsity)
    _check(pruned, layer, pruner_name, "unstructured", sparsity)


@EVERY_PRUNER
@EVERY_PATTERN
def test_deterministic(pruner_name: str, pattern_name: str) -> None:
    """Catches draws from the global stream, and results that depend on what was pruned before."""
    torch.manual_seed(1)
    first = _prune(pruner_name, pattern_name, _layer())
    torch.manual_seed(2)
    second = _prune(pruner_name, pattern_name, _layer())
    assert torch.equal(first.keep, second.keep)
    assert torch.equal(first.weight, second.weight)


@EVERY_PRUNER
@EVERY_PATTERN
@pytest.mark.parametrize("transposed", [False, True], ids=["as_linear", "as_conv1d"])
def test_nothing_is_changed_in_place(pruner_name: str, pattern_name: str, transposed: bool) -> None:
    """Catches an update of the given weight, or of the statistics that other layers share; the result is its own."""
    layer = _layer(transposed=transposed)
    gram = layer.inputs.gram
    assert gram is not None
    before = (layer.weight.clone(), gram.clone(), layer.inputs.norm.clone())
    pruned = _prune(pruner_name, pattern_name, layer)
    after = (layer.weight, gram, layer.inputs.norm)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert pruned.weight.data_ptr() != layer.weight.data_ptr()
    plain = _prune(pruner_name, pattern_name, _layer())
    assert torch.equal(pruned.keep, plain.keep)
    assert torch.equal(pruned.weight, plain.weight)


@EVERY_PATTERN
@pytest.mark.parametrize(
    "scores", [torch.zeros(4, 64), torch.arange(256.0).reshape(4, 64)], ids=["ties", "distinct"]
)
def test_patterns_keep_exactly_their_share(pattern_name: str, scores: Tensor) -> None:
    """Catches a pattern whose count depends on the scores."""
    pattern = option("pattern", pattern_name)
    sparsity = pattern.resolve(None)
    for within in Group:
        keep = pattern.keep(scores, sparsity, within)
        assert keep.dtype == torch.bool
        assert int((~keep).sum()) == round(scores.numel() * sparsity)


SIZE_ALLOCATIONS = [
    name for name in options("allocation") if isinstance(option("allocation", name), SizeAllocation)
]


@pytest.mark.parametrize("allocation_name", SIZE_ALLOCATIONS)
@given(
    sparsity=st.floats(0.0, 0.95),
    shapes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=12),
)
def test_allocations_keep_the_budget(
    allocation_name: str, sparsity: float, shapes: list[tuple[int, int]]
) -> None:
    """Catches a mean over layers where the mean over parameters is meant, and shares outside [0, 1)."""
    layers = Layers({f"{index // 2}.layer{index % 2}": shape for index, shape in enumerate(shapes)})
    found = option("allocation", allocation_name).allocate(layers, sparsity)
    assert set(found) == set(layers.shapes)
    assert all(0 <= share < 1 for share in found.values())
    total = sum(share * layers.num_weights[name] for name, share in found.items())
    assert total / sum(layers.num_weights.values()) == pytest.approx(sparsity, abs=1e-6)


@pytest.mark.parametrize("schedule_name", options("schedule"))
@given(sparsity=st.floats(0.01, 0.95))
def test_schedules_rise_to_the_sparsity(schedule_name: str, sparsity: float) -> None:
    """Catches steps that fall back, and a last step that is not the sparsity asked for."""
    steps = list(option("schedule", schedule_name).steps(sparsity))
    assert steps[-1] == sparsity
    assert all(earlier <= later for earlier, later in pairwise(steps))
    assert all(0 <= step < 1 for step in steps)
