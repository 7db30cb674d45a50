"""The last layer of a window after its training, against least squares by brute force; training steps in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import MakeModel
from helpers import plan_of, run_tiny, state_bytes
from reprune import dry_run
from reprune.engine import fitting
from reprune.engine.loop import BlockLoop
from reprune.errors import ConfigError, RunError
from reprune.fit_checks import check_last_layer
from reprune.identity import technique_identity
from reprune.pipeline import run
from reprune.pruning.contract import Needs
from reprune.pruning.wanda import Wanda
from reprune.reconstruction import last_layer
from reprune.reconstruction.last_layer import solve_last_layer
from reprune.reconstruction.objective import WindowObjective
from reprune.seeding import generator
from support import (
    ARCHITECTURES,
    block_loop,
    changed,
    load_tiny,
    preset,
    some_texts,
    state_of,
    trained_preset,
)

MANY = 400
NONE_ADDED = {"gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe", "olmoe", "gpt_oss"}
"""Architectures that normalise what they add, or add up experts."""


class Seen:
    """What `solve_last_layer` was given and left behind, window after window: losses and inputs by our own passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses: list[tuple[float, float]] = []
        self.told: list[dict[str, Any]] = []
        self.solved: list[dict[str, Tensor]] = []
        self.moved: set[str] = set()
        monkeypatch.setattr(fitting, "solve_last_layer", self.solve)

    def solve(self, objective: WindowObjective, view: Any, keep: Tensor, *rest: Any) -> dict[str, Any]:
        own = state_of(objective.model.model)
        start, samples = view.weight.clone(), range(len(objective))
        with torch.no_grad():
            before = float(objective.loss(samples, lambda block: {}))
            with last_layer._given(view.module) as given:
                output, target = objective.outputs(samples, lambda block: {})
            told = solve_last_layer(objective, view, keep, *rest)
            after = float(objective.loss(samples, lambda block: {}))
        root = objective.token_weights(target)[..., None].double().sqrt()
        self.losses.append((before, after))
        self.told.append(told)
        self.solved.append(
            {
                "change": view.weight - start, "now": view.weight.clone(), "keep": keep.clone(),
                "x": given[-1].reshape(*target.shape[:2], -1) * root, "e": (target - output) * root,
            }
        )  # fmt: skip
        self.moved = changed(own, objective.model.model)
        return told


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The real solver, with all it did."""
    return Seen(monkeypatch)


def _by_hand(x: Tensor, e: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The change [d_out, d_in] of float64 sequences [sequences, tokens, features], row by row, and η."""
    change, confirmed = torch.zeros(keep.shape, dtype=torch.float64), torch.zeros(len(keep), dtype=torch.float64)  # fmt: skip
    parts = [(x[first::2].flatten(0, 1), e[first::2].flatten(0, 1)) for first in (0, 1)]
    for row in range(len(keep)):

        def solved(some: Tensor, lacking: Tensor, columns: Tensor = keep[row], row: int = row) -> Tensor:
            inputs = some[:, columns]
            gram = inputs.T @ inputs
            return torch.linalg.solve(gram + last_layer.DAMP * gram.diagonal().diag(), inputs.T @ lacking[:, row])  # fmt: skip

        above = below = 0.0
        for own, other in (parts, reversed(parts)):
            moved = other[0][:, keep[row]] @ solved(*own)
            above, below = above + float(moved @ other[1][:, row]), below + float(moved @ moved)
        confirmed[row] = min(1.0, max(0.0, above / below))
        change[row, keep[row]] = confirmed[row] * solved(x.flatten(0, 1), e.flatten(0, 1))
    return change, confirmed


@pytest.mark.parametrize(
    ("technique", "token_weight", "architecture"),
    [
        ("br", "uniform", "llama"), ("br_gp", "inverse_energy", "opt"), ("br_gp_cr", "uniform", "gpt2"),
        ("br_gp", "capped_energy", "gpt_neox"), ("br_gp", "uniform", "falcon"),
    ],
)  # fmt: skip
def test_it_is_the_least_squares_that_both_halves_confirm(
    make_model: MakeModel, tmp_path: Path, seen: Seen, technique: str, token_weight: str, architecture: str
) -> None:
    """Catches a layer that is not the last, another target, masks that are let go, and halves that overlap."""
    chosen = trained_preset(technique, last_layer_iterations=MANY, token_weight=token_weight)
    model, texts = make_model(architecture, num_blocks=2), some_texts(num_sequences=15, length=40)
    rows, _ = block_loop(model, tmp_path, texts=texts, pruner=Wanda(), technique=chosen).run()
    assert len(seen.told) == (3 if technique == "br_gp_cr" else 2)
    for solved, (before, after), told in zip(seen.solved, seen.losses, seen.told, strict=True):
        expected, confirmed = _by_hand(solved["x"], solved["e"], solved["keep"])
        assert told["confirmed"] == pytest.approx(float(confirmed.mean()), abs=0.02)
        assert 0.05 < told["confirmed"] < 1
        apart = float((solved["change"] - expected).norm() / expected.norm())
        assert apart < 0.02
        assert after < before
        assert not solved["now"][~solved["keep"]].any()
    assert len(seen.moved) == 1
    recorded = [told["last_layer"] for row in rows for told in row["training"]]
    assert recorded[0] == seen.told[0]
    assert 1 < recorded[0]["iterations"] <= MANY


def test_what_one_half_alone_fits_is_left(make_model: MakeModel, tmp_path: Path, seen: Seen) -> None:
    """Catches noise that is fitted: of a target that the inputs say nothing of, next to nothing may be taken over."""
    shares = {}
    real = WindowObjective.outputs

    def noise(objective: WindowObjective, samples: Any, weights: Any) -> tuple[Tensor, Tensor]:
        output, _ = real(objective, samples, weights)
        rows = [torch.randn(output.shape[1:], generator=generator(0, "noise", sample)) for sample in samples]
        return output, output + torch.stack(rows)

    for name, outputs in (("window", real), ("noise", noise)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WindowObjective, "outputs", outputs)
            technique = trained_preset("br_gp", epochs=1, learning_rate=1e-9, last_layer_iterations=2)
            loop = block_loop(
                make_model("llama", num_blocks=1), tmp_path / name, texts=some_texts(15, 40), pruner=Wanda(), technique=technique
            )  # fmt: skip
            loop.run()
        shares[name] = seen.told[-1]["confirmed"]
    assert shares["noise"] < 0.1 < 0.4 < shares["window"]


def test_batches_do_not_matter(make_model: MakeModel, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Catches sums that leave out a batch, or count one twice."""
    found = []
    for size in (1, 4, 100):
        monkeypatch.setattr(fitting, "solve_last_layer", lambda *given, it=size: seen.solve(*given[:4], it, *given[5:]))  # fmt: skip
        technique = trained_preset("br_gp", last_layer_iterations=2, token_weight="inverse_energy")
        block_loop(
            make_model("llama", num_blocks=1), tmp_path / str(size), texts=some_texts(), pruner=Wanda(), technique=technique
        ).run()  # fmt: skip
        found.append(seen.solved[-1]["now"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - NONE_ADDED))
def test_models_in_half_precision(tmp_path: Path, seen: Seen, architecture: str, dtype: str) -> None:
    """Catches a layer that is looked for in another dtype than the block is in, and weights that stay float32."""
    model = load_tiny(architecture, num_blocks=2, dtype=dtype)
    technique = trained_preset("br_gp", epochs=1, last_layer_iterations=2, training_dtype="bfloat16")
    block_loop(model, tmp_path, pruner=Wanda(), technique=technique).run()
    assert len(seen.told) == len(model.blocks)
    assert all(after < before for before, after in seen.losses)
    assert {it.dtype for it in model.blocks.parameters()} == {model.plan.dtype}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_nothing_but_an_addition_follows_it(make_model: MakeModel, architecture: str) -> None:
    """Catches a norm, a factor or a router behind the layer that is taken for the last, and one that is there for none."""
    model = make_model(architecture)
    for block in range(len(model.blocks)):
        if architecture in NONE_ADDED:
            with pytest.raises(RunError, match="stands between"):
                model.added_last(block)
        else:
            view = model.added_last(block)
            hidden = model.embed(torch.zeros(1, 3, dtype=torch.long))
            call = model.call(block, 1, 3)
            whole, twice = call.run(model.blocks[block], hidden), dict(model.blocks[block].named_parameters())
            twice[view.parameter] = 2 * twice[view.parameter]
            with last_layer._given(view.module) as given:
                moved = call.run(model.blocks[block], hidden, weights=twice)
            own = (given[-1] @ view.weight.T).reshape(whole.shape)
            torch.testing.assert_close(moved - whole, own, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [[], ["transform=block_drop", "transform.count=1"]])
def test_a_norm_behind_it_is_refused_before_anything_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Catches a window that is fitted to what its last layer alone never puts out, and work that is spent on it."""
    plan = plan_of(tmp_path, "model.architecture=gemma2", "+model.config.head_dim=8", "reconstruction.last_layer_iterations=2", *more)  # fmt: skip
    monkeypatch.setattr(BlockLoop, "run", None)
    with pytest.raises(RunError, match=r"block 0: no layer's output .*last_layer_iterations=0"):
        run(plan)
    assert plan.folder.status().state == "failed"


def test_one_sequence_and_shared_weights_are_refused_at_once(tmp_path: Path) -> None:
    """Catches a half with nothing in it, and a layer whose change changes the blocks before it."""
    given = ("reconstruction=br_gp_cr", "reconstruction.last_layer_iterations=2")
    with pytest.raises(ConfigError, match="one half of the sequences"):
        plan_of(tmp_path, *given, "calibration.num_sequences=1")
    technique = preset("br_gp_cr", last_layer_iterations=2)
    with pytest.raises(ConfigError, match="are one tensor"):
        check_last_layer(technique, "block 0 and block 1", [])
    check_last_layer(
        preset("br_gp", last_layer_iterations=2), "block 0 and block 1", plan_of(tmp_path).requests
    )


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("none", {}, "nothing is trained"),
        ("br", {"loss": "cosine"}, "no other loss"),
        ("br", {"anchor": 1.0}, "kept near"),
        ("br", {"stop_on": "web"}, "validation text chose"),
        ("br", {"trainable": "bias_norm"}, "weights of a layer"),
        ("submodule", {}, "whole blocks"),
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_in_bfloat16_comes_near_training_in_float32(
    make_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    """Catches weights or moments that lose their precision, and a choice that changes nothing."""
    ends, weights, texts = {}, {}, some_texts()
    for dtype in ("float32", "bfloat16"):
        model = make_model(architecture, num_blocks=1)
        technique = trained_preset("br_gp", training_dtype=dtype)
        rows, _ = block_loop(model, tmp_path / dtype, texts=texts, pruner=Wanda(), technique=technique).run()
        ends[dtype] = rows[0]["after"]["calibration"]["mask"]["error"]
        weights[dtype] = list(state_of(model.blocks).values())
        assert ends[dtype] < rows[0]["before"]["calibration"]["mask"]["error"]
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.05)
    pairs = list(zip(weights["float32"], weights["bfloat16"], strict=True))
    assert any(not torch.equal(one, other) for one, other in pairs)
    # Steps that bfloat16 could not hold are still there.
    assert any(not torch.equal(other, other.bfloat16().float()) for _, other in pairs)


@pytest.mark.parametrize("more", [[], ["memory.weights=disk"]])
def test_as_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    """Catches a record or a plan without them, and a solution that is lost where weights rest on disk."""
    choices = ("reconstruction=br_gp_cr", "reconstruction.training_dtype=bfloat16", "reconstruction.last_layer_iterations=2")  # fmt: skip
    dry_run.show(plan_of(tmp_path, *choices))
    said = " ".join(capsys.readouterr().out.split())
    assert "products in bfloat16, then 2 iterations of least squares of its last layer" in said
    plan, _ = run_tiny(tmp_path / "a", *choices, *more)
    told = [told["last_layer"] for row in plan.folder.blocks() for told in row["training"]]
    assert {it["iterations"] for it in told} == {2}
    other, _ = run_tiny(tmp_path / "b", *choices)
    assert state_bytes(plan.folder.path) == state_bytes(other.folder.path)
    assert plan.folder.id != plan_of(tmp_path, *choices[:2]).folder.id
