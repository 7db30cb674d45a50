"""The real 135M model, once: from the wheel through the whole pipeline to a checkpoint that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprune.build import build
from reprune.check import check
from reprune.compose import compose_run
from reprune.model.sources import WheelModel
from reprune.pipeline import run
from reprune.run_folder import RunFolder

SMALL = [
    "calibration.length=128",
    "~calibration@probes.held_out",
    "~calibration@probes.wiki",
    "~calibration@probes.code",
    "evaluation=quick",
    "evaluation.perplexity.num_windows=2",
    "tracking=jsonl",
]


@pytest.mark.real
def test_smollm2_is_pruned_in_every_block_and_still_speaks(tmp_path: Path) -> None:
    """Wanda 2:4: each of 30 blocks at exactly half, a dense perplexity as it should be, a pruned one near it."""
    plan = check(
        compose_run(
            [
                "pruner=wanda",
                "pattern=2to4",
                "reconstruction=none",
                "calibration.num_sequences=4",
                *SMALL,
                "export.model=true",
                f"output_dir={tmp_path}",
            ]
        )
    )
    result = run(plan)
    assert result["sparsity"]["total"] == 0.5
    assert len(result["sparsity"]["layers"]) == 30 * 7
    assert set(result["sparsity"]["layers"].values()) == {0.5}
    metrics = result["metrics"]
    assert 10 < metrics["eval/dense/perplexity/wiki"] < 60
    assert metrics["eval/dense/perplexity/wiki"] < metrics["eval/pruned/perplexity/wiki"] < 2000
    errors = [row["after"]["calibration"]["web"]["error"] for row in RunFolder(plan.folder.path).blocks()]
    assert len(errors) == 30
    assert all(error > 0 for error in errors)

    saved = plan.folder.path / "model"
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    weight = model.model.layers[29].mlp.down_proj.weight
    assert int((weight.reshape(-1, 4) == 0).sum(dim=1).min()) >= 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()


@pytest.mark.real
def test_gemma3_solves_its_least_squares(tmp_path: Path) -> None:
    """Mixed attention, norms behind attention and MLP, BOS that decides: the error falls, the last block's too."""
    node = compose_run(["model=gemma3_270m"]).config["model"]
    source: WheelModel = build(node, "model")
    if any(wheel.cached() is None for wheel in source._wheels()):
        pytest.skip("its four wheels (240 MB) are not in the cache; reprune model=gemma3_270m fetches them")
    last = {}
    for technique in ("none", "least_squares"):
        overrides = [
            "model=gemma3_270m",
            "pruner=wanda",
            f"reconstruction={technique}",
            f"output_dir={tmp_path}",
        ]
        plan = check(compose_run([*overrides, "calibration.num_sequences=4", *SMALL]))
        result = run(plan)
        assert set(result["sparsity"]["layers"].values()) == {0.5}
        assert len(result["sparsity"]["layers"]) == 18 * 7
        assert 5 < result["metrics"]["eval/dense/perplexity/wiki"] < 60
        rows = RunFolder(plan.folder.path).blocks()
        last[technique] = [row["after"]["calibration"]["web"]["relative"] for row in rows]
    assert sum(last["least_squares"]) < 0.8 * sum(last["none"])
