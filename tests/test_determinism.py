"""The same command gives the same numbers, whatever else ran before in the process."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import perplexity_on, run_tiny, state_bytes, write_documents

REFERENCE = {
    "sparsegpt": ["pruner=sparsegpt", "reconstruction=br_gp_cr", "reconstruction.epochs=2"],
    "random": ["pruner=random", "reconstruction=br", "reconstruction.epochs=2"],
    "generated": [
        "pruner=wanda", "reconstruction=br_gp", "reconstruction.epochs=1", "calibration=generated",
        "calibration.num_sequences=3", "calibration.length=16", "calibration.language=null",
        "calibration.max_new_tokens=20", "calibration.batch_size=2",
    ],
}  # fmt: skip


@pytest.fixture(params=REFERENCE)
def method(request: pytest.FixtureRequest) -> list[str]:
    """A command line for each source of randomness: mask scores, batch order, generated text."""
    return REFERENCE[request.param]


def _fresh(
    tmp_path: Path, name: str, method: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict, dict]:
    """Do the run with folders and a cache of its own; its bytes and metrics."""
    text = tmp_path / "held_out.jsonl"
    write_documents(text, seed=5)
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / name / "cache"))
    plan, result = run_tiny(tmp_path / name, *method, *perplexity_on(mine=text))
    return state_bytes(plan.folder.path), result["metrics"]


def test_same_bytes_after_other_work(
    tmp_path: Path, method: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches global seeds, draws from a shared stream, and state that one run leaves for the next."""
    first_bytes, first_metrics = _fresh(tmp_path, "first", method, monkeypatch)
    run_tiny(tmp_path / "other", "seed=7", "pruner=random", "reconstruction=br_gp", "model.architecture=gpt2")
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)
    torch.rand(1000)
    second_bytes, second_metrics = _fresh(tmp_path, "second", method, monkeypatch)
    assert first_bytes
    assert second_bytes == first_bytes
    assert second_metrics == first_metrics


def test_seed_changes_bytes(tmp_path: Path, method: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a seed that reaches nothing, which would make the test above pass for the wrong reason."""
    first, _ = _fresh(tmp_path, "first", method, monkeypatch)
    other, _ = _fresh(tmp_path, "other", [*method, "seed=1"], monkeypatch)
    assert first.keys() == other.keys()
    assert first != other
