"""The block loop on a CUDA device against the same on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import MakeModel
from helpers import run_tiny
from reprune.pruning.sparsegpt import SparseGPT
from support import block_loop, trained_preset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("technique", ["none", "br", "br_gp", "br_gp_cr"])
def test_cuda_agrees_with_the_host(
    make_model: MakeModel, tmp_path: Path, architecture: str, technique: str
) -> None:
    """Catches masks, blocks or call arguments left on the wrong device, and TF32 in the statistics."""
    rows = {}
    for place in ("cpu", "cuda"):
        model = make_model(architecture, device=torch.device(place))
        loop = block_loop(model, tmp_path / place, pruner=SparseGPT(), technique=trained_preset(technique))
        rows[place], masks = loop.run()
        assert {parameter.device.type for parameter in model.model.parameters()} == {"cpu"}
        for index, layers in masks.items():
            for name, keep in layers.items():
                assert not model.blocks[index].get_submodule(name).weight[~keep].any()
    for host, cuda in zip(rows["cpu"], rows["cuda"], strict=True):
        assert {n: layer["removed"] for n, layer in host["layers"].items()} == {
            n: layer["removed"] for n, layer in cuda["layers"].items()
        }
        for role, texts in host["after"].items():
            for name, errors in texts.items():
                assert cuda["after"][role][name] == pytest.approx(errors, rel=0.02)


def test_bfloat16_trains_on_cuda(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a block that stays in float32 or on the device after its training."""
    model = make_model("gpt2", dtype="bfloat16", device=torch.device("cuda"))
    rows, _ = block_loop(model, tmp_path, technique=trained_preset("br_gp_cr")).run()
    assert {(tensor.dtype, tensor.device.type) for tensor in model.model.parameters()} == {
        (torch.bfloat16, "cpu")
    }
    assert all(
        row["training"][-1]["epoch_losses"][-1] < row["training"][-1]["epoch_losses"][0] for row in rows
    )


@pytest.mark.parametrize(
    "choices",
    [
        ["method=flap", "export.compact=true", "allocation=uniform"],
        ["method=amp"],
        ["transform=block_drop", "transform.count=1"],
        ["transform=vocabulary"],
    ],
    ids=lambda choices: choices[0],
)
def test_units_and_transforms_on_cuda(tmp_path: Path, choices: list[str]) -> None:
    """Catches biases, columns of units and rows of the vocabulary that are left on the wrong device."""
    errors = {}
    for place in ("cpu", "cuda"):
        plan, result = run_tiny(tmp_path / place, f"device={place}", *choices)
        errors[place] = [row["after"]["calibration"]["vocabulary"]["error"] for row in plan.folder.blocks()]
        assert not result.get("compact", {}).get("remarks")
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)
