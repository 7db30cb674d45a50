"""Structured pruning: whole heads and channels, on the engine that prunes weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import plan_of, run_tiny, state_bytes
from reprune.engine.units import prune_units
from reprune.errors import ConfigError, RunError
from reprune.model.coupling import Coupling, find_couplings
from reprune.pruning.contract import LayerContext, ScorePruner, UnitPruner
from reprune.pruning.magnitude import Magnitude
from reprune.pruning.wanda import Wanda
from reprune.sparsity.coupled_units import CoupledUnits
from reprune.sparsity.iterative import Iterative
from support import ARCHITECTURES, block_loop, load_tiny, option, options, preset

DENSE_MLP = [name for name in ARCHITECTURES if name not in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")]


@pytest.mark.parametrize("architecture", DENSE_MLP)
def test_whole_units_go_and_only_those(architecture: str, tmp_path: Path) -> None:
    """Catches half a head, a head without its values, other counts, and masks that reconstruction does not hold."""
    model = load_tiny(architecture)
    loop = block_loop(
        model, tmp_path, pruner=Wanda(), pattern=CoupledUnits(), sparsity=0.5,
        technique=preset("br_gp", epochs=1, batch_size=4, learning_rate=1e-3),
    )  # fmt: skip
    rows, masks = loop.run()
    for block, views in enumerate(model.linears):
        keep = {name: view.orient(masks[block][name]) for name, view in views.items()}
        members = set()
        for coupling in find_couplings(model, block):
            members |= {coupling.consumer, *coupling.rows}
            consumer = keep[coupling.consumer]
            stays = consumer[0][coupling.columns]
            assert (stays == stays[:, :1]).all()
            kept = stays[:, 0]
            # Round half up of what goes.
            assert int((~kept).sum()) == min(int(len(kept) * 0.5 + 0.5), len(kept) - 1)
            assert torch.equal(consumer, consumer[:1].expand_as(consumer))
            for name, places in coupling.rows.items():
                own = keep[name]
                assert torch.equal(own, own[:, :1].expand_as(own))
                assert torch.equal(own[places][:, :, 0], kept[:, None].expand(places.shape))
            facts = rows[block]["layers"][coupling.consumer]["facts"]
            assert facts == {"units": len(kept), "removed_units": int((~kept).sum())}
        assert members == set(views)
        for name, view in views.items():
            assert not view.weight[~keep[name]].any()


def _not_read(couplings: Sequence[Coupling]) -> dict[str, Tensor]:
    raise AssertionError("scores of weights need nothing of what units put out")


def test_the_units_with_the_lowest_sums_go() -> None:
    """Catches sums over other rows than the unit's, and scores of one layer alone where all count."""
    model = load_tiny("llama")
    layers = {
        name: LayerContext(name, 0, view.weight, None, torch.Generator())
        for name, view in model.linears[0].items()
    }
    shares = dict.fromkeys(layers, 0.25)
    for pattern in (CoupledUnits(), CoupledUnits(scores_of="consumer")):
        found = prune_units(model, Magnitude(), pattern, layers, shares, _not_read)
        coupling = max(find_couplings(model, 0), key=lambda it: len(it.columns))
        sums = []
        for unit in range(len(coupling.columns)):
            total = layers[coupling.consumer].weight[:, coupling.columns[unit]].abs().sum()
            if pattern.scores_of == "all":
                for name, places in coupling.rows.items():
                    total = total + layers[name].weight[places[unit]].abs().sum()
            sums.append(float(total))
        gone = sorted(range(len(sums)), key=sums.__getitem__)[: int(len(sums) * 0.25 + 0.5)]
        columns = ~found[coupling.consumer].keep[0]
        assert set(columns.nonzero().flatten().tolist()) == {
            int(c) for u in gone for c in coupling.columns[u]
        }


def test_one_unit_always_stays(tmp_path: Path) -> None:
    """Catches an attention of one unit, whose heads share their keys, that vanishes at 50 %."""
    loop = block_loop(
        load_tiny("llama", num_key_value_heads=1), tmp_path, pruner=Magnitude(), pattern=CoupledUnits()
    )
    rows, masks = loop.run()
    assert rows[0]["layers"]["self_attn.o_proj"]["facts"] == {"units": 1, "removed_units": 0}
    assert bool(masks[0]["self_attn.v_proj"].all())
    assert rows[0]["layers"]["mlp.down_proj"]["measured"] == 0.5


def test_rounds_never_bring_a_unit_back(tmp_path: Path) -> None:
    """Catches units that are chosen anew in each round, whatever went before."""
    model = load_tiny("llama")
    schedule = Iterative(rounds=3, shape="linear", reconstruct="end")
    loop = block_loop(
        model, tmp_path, pruner=Magnitude(), pattern=CoupledUnits(), sparsity=0.6, schedule=schedule
    )
    rows, masks = loop.run()
    mlp = max(find_couplings(model, 0), key=lambda it: len(it.columns))
    gone = int((~masks[0][mlp.consumer][0]).sum())
    assert gone == int(len(mlp.columns) * 0.6 + 0.5)
    assert rows[0]["layers"][mlp.consumer]["facts"]["removed_units"] == gone


def test_targets_hold_whole_submodules(tmp_path: Path) -> None:
    """Catches an MLP that loses rows of one projection, and layers outside units that stay dense in silence."""
    plan, result = run_tiny(
        tmp_path, "pruner=magnitude", "pattern=structured", "targets=mlp", "reconstruction=none"
    )
    assert (
        0
        < result["sparsity"]["of_all_prunable"]
        < result["sparsity"]["total"]
        == pytest.approx(0.5, abs=0.02)
    )
    with pytest.raises(RunError, match="goes as a whole"):
        run_tiny(
            tmp_path, "pruner=magnitude", "pattern=structured", "targets=*.down_proj", "reconstruction=none"
        )
    assert plan.pattern.units


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["pruner=sparsegpt"], "pattern"),
        (["pruner=magnitude", "refine=sparse_swaps"], "refine"),
        (
            ["pruner=wanda", "reconstruction=none", "reconstruction.within_block=sequential"],
            "reconstruction.within_block",
        ),
        (["pruner=wanda", "model.architecture=mixtral", "+model.config.num_local_experts=4"], "targets"),
    ],
    ids=["update", "refine", "sequential", "experts"],
)
def test_what_cannot_go_with_units(tmp_path: Path, given: list[str], key: str) -> None:
    """Catches combinations that would prune something else than they say."""
    with pytest.raises(ConfigError) as refused:
        plan_of(tmp_path, "pattern=structured", *given)
    assert refused.value.key == key
    assert "units" in refused.value.screen()


BY_UNITS = [
    name
    for name in options("pruner")
    if name not in ("mask", "none") and isinstance(option("pruner", name), ScorePruner | UnitPruner)
]


@pytest.mark.parametrize("pruner_name", BY_UNITS)
def test_every_score_prunes_units(tmp_path: Path, pruner_name: str) -> None:
    """Catches scores of units that are not finite in half precision, draws that differ, and other counts."""
    choices = [f"pruner={pruner_name}", "pattern=structured", "reconstruction=none", "dtype=bfloat16"]
    (one, result), (other, _) = (run_tiny(tmp_path / place, *choices) for place in ("one", "other"))
    assert state_bytes(one.folder.path) == state_bytes(other.folder.path)
    assert result["sparsity"]["total"] == pytest.approx(0.5, abs=0.02)
    facts = [layer["facts"] for row in one.folder.blocks() for layer in row["layers"].values()]
    assert {fact["removed_units"] / fact["units"] for fact in facts} == {0.5}
