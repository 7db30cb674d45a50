"""The last layer of a window after its training, against least squares by brute force; training steps in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import MakeModel
from helpers import plan_of, run_tiny
from reprune.engine import fitting
from reprune.errors import ConfigError, RunError
from reprune.identity import technique_identity
from reprune.pipeline import run
from reprune.pruning.contract import Needs
from reprune.pruning.wanda import Wanda
from reprune.reconstruction import last_layer
from reprune.reconstruction.last_layer import solve_last_layer
from reprune.reconstruction.objective import WindowObjective
from support import ARCHITECTURES, block_loop, preset, some_texts, state_of, trained_preset

MANY = 400
NONE_ADDED = {"gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe", "olmoe", "gpt_oss"}
"""Architectures that normalise what they add, or add up experts."""


class Seen:
    """What `solve_last_layer` was given and left behind, window after window: losses and inputs by our own passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[str] = []
        self.losses: list[tuple[float, float]] = []
        self.told: list[dict[str, Any]] = []
        self.solved: list[dict[str, Tensor]] = []
        monkeypatch.setattr(fitting, "solve_last_layer", self.solve)

    def solve(self, objective: WindowObjective, view: Any, keep: Tensor, *rest: Any) -> dict[str, Any]:
        own = {name: it.clone() for name, it in state_of(objective.model.model).items()}
        start, samples = view.weight.clone(), range(len(objective))
        with torch.no_grad():
            before = float(objective.loss(samples, lambda block: {}))
            with last_layer._given(view.module) as given:
                output, target = objective.outputs(samples, lambda block: {})
            told = solve_last_layer(objective, view, keep, *rest)
            after = float(objective.loss(samples, lambda block: {}))
        weights = objective.token_weights(target).reshape(-1, 1)
        self.layers.append(view.name)
        self.losses.append((before, after))
        self.told.append(told)
        self.solved.append(
            {
                "start": start, "now": view.weight.clone(), "keep": keep.clone(), "weights": weights,
                "inputs": given[-1].reshape(len(weights), -1), "lacking": (target - output).reshape(len(weights), -1),
            }
        )  # fmt: skip
        now = state_of(objective.model.model)
        self.moved = {name for name in own if not torch.equal(own[name], now[name])}
        return told


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The real solver, with all it did."""
    return Seen(monkeypatch)


@pytest.mark.parametrize(
    ("technique", "token_weight", "architecture"),
    [
        ("br", "uniform", "llama"), ("br_gp", "inverse_energy", "opt"), ("br_gp_cr", "uniform", "gpt2"),
        ("submodule", "uniform", "llama"), ("br_gp", "uniform", "gpt_neox"), ("br_gp", "uniform", "falcon"),
    ],
)  # fmt: skip
def test_it_ends_at_the_minimum_of_the_window(
    make_model: MakeModel, tmp_path: Path, seen: Seen, technique: str, token_weight: str, architecture: str
) -> None:
    """Catches a layer that is not the last, another target, masks that are let go, losses that are not the window's."""
    chosen = trained_preset(technique, last_layer_iterations=MANY, token_weight=token_weight)
    model = make_model(architecture, num_blocks=2)
    rows, _ = block_loop(model, tmp_path, texts=some_texts(), pruner=Wanda(), technique=chosen).run()
    assert len(seen.layers) == {"br_gp_cr": 3, "submodule": 4}.get(technique, 2)
    for solved, (before, after), told in zip(seen.solved, seen.losses, seen.told, strict=True):
        assert told["losses"] == pytest.approx([before, after], abs=0.01 * before)
        assert after < 0.999 * before
        keep, root = solved["keep"], solved["weights"].double().sqrt()
        x, e = solved["inputs"].double() * root, solved["lacking"].double() * root
        least = 0.0
        for row in range(len(keep)):
            columns = x[:, keep[row]]
            # Any of the solutions, where tokens are fewer than weights: the loss is that of all.
            change = torch.linalg.lstsq(columns, e[:, row], driver="gelsd").solution
            least += float((e[:, row] - columns @ change).square().sum())
        least /= float(solved["weights"].sum()) * e.shape[1]
        assert after <= least + 0.02 * (before - least)
        assert not solved["now"][~keep].any()
    assert len(seen.moved) == 1
    recorded = [told["last_layer"] for row in rows for told in row["training"]]
    assert recorded[0] == seen.told[0]
    assert 1 < recorded[0]["iterations"] <= MANY


def test_few_iterations_never_raise_the_loss(make_model: MakeModel, tmp_path: Path, seen: Seen) -> None:
    """Catches steps that are too long, and an epoch more of noise: each iteration lowers the loss of the window."""
    ends = []
    for iterations in (1, 2, 8):
        technique = trained_preset("br_gp", last_layer_iterations=iterations)
        model = make_model("llama", num_blocks=1)
        block_loop(model, tmp_path / str(iterations), texts=some_texts(), pruner=Wanda(), technique=technique).run()  # fmt: skip
        before, after = seen.losses[-1]
        assert after < before
        ends.append(after)
    assert ends == sorted(ends, reverse=True)


def test_batches_do_not_matter(make_model: MakeModel, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Catches sums that leave out a batch, or count one twice."""
    found = []
    for size in (1, 4, 100):
        monkeypatch.setattr(
            "reprune.model.device.DevicePlan.sequences_a_pass", lambda plan, length, it=size: it
        )
        technique = trained_preset("br_gp", last_layer_iterations=2, token_weight="inverse_energy")
        block_loop(
            make_model("llama", num_blocks=1), tmp_path / str(size), texts=some_texts(), pruner=Wanda(), technique=technique
        ).run()  # fmt: skip
        found.append(seen.solved[-1]["now"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_nothing_but_an_addition_follows_it(make_model: MakeModel, architecture: str) -> None:
    """Catches a norm, a factor or a router behind the layer that is taken for the last, and one that is there for none."""
    model = make_model(architecture)
    for block in range(len(model.blocks)):
        view = model.last_added(block)
        assert (view is None) == (architecture in NONE_ADDED), architecture
        if view is not None:
            hidden = model.embed(torch.zeros(1, 3, dtype=torch.long))
            call = model.call(block, 1, 3)
            whole, twice = call.run(model.blocks[block], hidden), dict(model.blocks[block].named_parameters())
            twice[view.parameter] = 2 * twice[view.parameter]
            with last_layer._given(view.module) as given:
                moved = call.run(model.blocks[block], hidden, weights=twice)
            own = (given[-1] @ view.weight.T).reshape(whole.shape)
            torch.testing.assert_close(moved - whole, own, rtol=1e-3, atol=1e-5)


def test_a_norm_behind_it_is_refused_before_anything_is_pruned(tmp_path: Path) -> None:
    """Catches a window that is fitted to what its last layer alone never puts out."""
    plan = plan_of(tmp_path, "model.architecture=gemma2", "+model.config.head_dim=8", "reconstruction.last_layer_iterations=2")  # fmt: skip
    with pytest.raises(RunError, match=r"block 0: no layer.s output .*last_layer_iterations=0"):
        run(plan)
    assert not plan.folder.blocks()
    assert plan.folder.status().state == "failed"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("none", {}, "nothing is trained"),
        ("br", {"loss": "cosine"}, "no other loss"),
        ("br", {"anchor": 1.0}, "kept near"),
        ("br", {"stop_on": "web"}, "validation text chose"),
        ("br", {"last_layer_iterations": -1}, "last_layer_iterations"),
    ],
)
def test_what_it_does_not_go_with_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    """Catches a choice that is read by nothing, and one that undoes another."""
    with pytest.raises(ConfigError, match=words):
        preset(name, **{"last_layer_iterations": 2, **changes})


def test_runs_without_them_are_the_runs_they_were() -> None:
    """Catches an identity that changes for runs which the new choices do not touch, or does not for those they do."""
    plain = technique_identity(preset("br"), Needs(), 1)
    assert not {"training_dtype", "last_layer_iterations"} & set(plain)
    for change in ({"training_dtype": "bfloat16"}, {"last_layer_iterations": 1}):
        assert technique_identity(preset("br", **change), Needs(), 1) == {**plain, **change}


def test_training_in_bfloat16_comes_near_training_in_float32(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches weights, moments or losses that lose their precision, and a choice that changes nothing."""
    texts, ends, weights = some_texts(), {}, {}
    for dtype in ("float32", "bfloat16"):
        model = make_model("llama", num_blocks=2)
        technique = trained_preset("br_gp_cr", training_dtype=dtype, epochs=4)
        loop = block_loop(model, tmp_path / dtype, texts=texts, pruner=Wanda(), technique=technique)
        rows, _ = loop.run()
        ends[dtype] = [row["after"]["calibration"]["mask"]["error"] for row in rows]
        weights[dtype] = state_of(model.model)
        assert all(it.dtype == torch.float32 for it in weights[dtype].values())
        assert (
            rows[-1]["after"]["calibration"]["mask"]["error"]
            < rows[-1]["before"]["calibration"]["mask"]["error"]
        )
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.02)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(weights["float32"][name], weights["bfloat16"][name])
    # Steps of 1e-3 that bfloat16 could not hold are still there.
    rounded = weights["bfloat16"][name].bfloat16().float()
    assert not torch.equal(rounded, weights["bfloat16"][name])


def test_as_a_run(tmp_path: Path) -> None:
    """Catches a record, a plan or a summary without them."""
    choices = ("reconstruction=br_gp_cr", "reconstruction.training_dtype=bfloat16", "reconstruction.last_layer_iterations=2")  # fmt: skip
    plan, _ = run_tiny(tmp_path, *choices)
    rows = plan.folder.blocks()
    assert {told["last_layer"]["iterations"] for row in rows for told in row["training"]} == {2}
    assert "last_layer_iterations: 2" in (plan.folder.path / "config.yaml").read_text(encoding="utf-8")
    assert plan.folder.id != plan_of(tmp_path, *choices[:2]).folder.id
