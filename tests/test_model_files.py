"""Checkpoints that are not whole, and what makes a model this model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import plan_of
from reprune.check import check
from reprune.compose import compose_run
from reprune.errors import ConfigError, RunError
from reprune.model.sources import HubModel
from reprune.model.tiny import TinyModel
from reprune.pipeline import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model of the test's own."""
    return Path(shutil.copytree(TinyModel().folder(), tmp_path / "model"))


def _local(folder: Path) -> list[str]:
    # The overrides of a tiny run begin with model=tiny; the last one wins.
    return ["model=local", f"model.path={folder}"]


def test_missing_weight_is_no_random_one(folder: Path, tmp_path: Path) -> None:
    """Catches transformers' random numbers for a weight that the file does not have."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    plan = plan_of(tmp_path / "out", *_local(folder))
    with pytest.raises(RunError, match=r"1 weights are missing.*layers\.1\.mlp\.down_proj"):
        run(plan)
    assert plan.folder.status().state == "failed"


def test_file_that_was_cut_off(folder: Path, tmp_path: Path) -> None:
    """Catches an interrupted download that is found only when its weights are read."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged or not whole"):
        plan_of(tmp_path / "out", *_local(folder))


def test_adapter_alone_is_no_model(folder: Path, tmp_path: Path) -> None:
    """Catches any safetensors file taken for the model's weights."""
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="no weights"):
        plan_of(tmp_path / "out", *_local(folder))


def test_trainers_leftovers_are_no_weights(folder: Path, tmp_path: Path) -> None:
    """Catches optimizer.pt read as if it were the model."""
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="no weights"):
        plan_of(tmp_path / "out", *_local(folder), "model.allow_bin=true")


@pytest.mark.parametrize("pickled", [True, False])
def test_pickles_are_fetched_where_there_is_nothing_else(
    folder: Path, pickled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a repository that has its weights in both formats and is downloaded twice over."""
    weights = load_file(folder / "model.safetensors")
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    asked = []

    def snapshot(_: str, *, allow_patterns: list[str], **__: str) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    made = HubModel(name="both", repository="owner/name", allow_bin=True).folder()
    assert ("pytorch_model*.bin" in asked) == pickled
    assert load_file(made / "model.safetensors").keys() == weights.keys()


def test_another_tokenizer_is_another_run(folder: Path, tmp_path: Path) -> None:
    """Catches a hash of the weights alone: other token ids under the same name."""
    before = plan_of(tmp_path / "out", *_local(folder)).folder.id
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(rules))
    assert plan_of(tmp_path / "out", *_local(folder)).folder.id != before


def test_weights_by_content_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    """Catches a path in the identity."""
    other = shutil.copytree(folder, tmp_path / "elsewhere")
    one = plan_of(tmp_path / "out", *_local(folder)).folder.id
    assert plan_of(tmp_path / "out", *_local(Path(other))).folder.id == one


def test_a_header_in_every_file_is_no_overlap(tmp_path: Path) -> None:
    """Catches a user's boilerplate, which stands in many documents, taken for repeated held-out text."""
    header = (
        "Copyright of the authors of this collection, all of whom kindly gave it away for every use. " * 2
    )
    documents = tmp_path / "documents.jsonl"
    rows = [json.dumps({"text": header + " ".join(f"w{i}x{j}" for j in range(200))}) for i in range(40)]
    documents.write_text("\n".join(rows))
    arguments = [f"calibration.domain={documents}", "calibration.num_sequences=4", "calibration.length=128"]
    common = [
        "model=tiny",
        "evaluation=none",
        "tracking=jsonl",
        "~calibration@probes.wiki",
        "~calibration@probes.code",
    ]
    plan = check(compose_run([*common, "calibration=domain", *arguments, f"output_dir={tmp_path / 'out'}"]))
    assert plan.requests
