"""The real 135M model, once: from the wheel through the whole pipeline to a checkpoint that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprune.check import check
from reprune.compose import compose_run
from reprune.pipeline import run
from reprune.run_folder import RunFolder


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
                "calibration.length=128",
                "probes={}",
                "~calibration@probes.held_out",
                "~calibration@probes.wiki",
                "~calibration@probes.code",
                "evaluation=quick",
                "evaluation.perplexity.num_windows=2",
                "tracking=jsonl",
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
