"""The block loop on every architecture: nothing changes what it should not, and nothing is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import MakeModel
from reprune.engine.activations import Stores
from reprune.engine.chains import Chains
from reprune.errors import RunError
from reprune.model import device
from reprune.model.blocks import same_calls
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import Pruner
from reprune.pruning.keep_all import KeepAll
from reprune.pruning.magnitude import Magnitude
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.sparsity.patterns import KeptOfGroup, Unstructured
from support import (
    ARCHITECTURES,
    MIXED_ATTENTION,
    block_loop,
    block_outputs,
    changed,
    some_texts,
    state_of,
    trained_preset,
)

EVERY = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


ROUTERS = ("mlp.gate.weight", "mlp.router.weight")


def _prunable(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Prunable weights, found without the package's own code: matrices of the blocks, and those stacked in a third dimension."""
    found = {}
    for index, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            if parameter.dim() == 3:
                found |= {f"{index}.{name}.{expert}": weight for expert, weight in enumerate(parameter)}
            elif parameter.dim() == 2 and name.endswith(".weight") and name not in ROUTERS:
                found[f"{index}.{name.removesuffix('.weight')}"] = parameter
    return found


@EVERY
@pytest.mark.parametrize("batch", [1, 3])
def test_sparsity_zero_is_the_plain_forward(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, batch: int
) -> None:
    """Catches `out[0]` on a tensor, a growing cache, block 0's arguments for all blocks, and touched weights."""
    texts = some_texts()
    length = texts.mask[0].tokens_NT.shape[1]
    model = make_model(architecture)
    before = state_of(model.model)
    monkeypatch.setitem(device.TOKENS_A_PASS, "cpu", batch * length)
    loop = block_loop(model, tmp_path, texts=texts, sparsity=0.0)
    rows, masks = loop.run()
    assert changed(before, model.model) == set()
    assert len(rows) == len(model.blocks)
    for row in rows:
        errors = [
            value for texts in row["after"].values() for text in texts.values() for value in text.values()
        ]
        assert errors == [0.0] * len(errors)
        assert len(errors) == 6
    assert all(keep.all() for layers in masks.values() for keep in layers.values())
    chains = Chains(model, texts.all, Stores(torch.float32, 32, tmp_path, on_disk=False))
    for block in range(len(model.blocks)):
        chains.advance_dense(block)
    for text in texts.all:
        for block, plain in enumerate(block_outputs(model, text.tokens_NT, batch)):
            streamed = chains.dense[block + 1][text.key].states_NTH
            torch.testing.assert_close(streamed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", MIXED_ATTENTION)
def test_mixed_attention_is_mixed(make_model: MakeModel, architecture: str) -> None:
    """Guards the test above: with these settings block 0's arguments really are wrong for another block."""
    model = make_model(architecture)
    tokens = some_texts().mask[0].tokens_NT
    _ = model.embed(tokens)
    calls = [model.call(block, *tokens.shape) for block in range(len(model.blocks))]
    assert not all(same_calls(calls[:1], [call]) for call in calls[1:])


@EVERY
@pytest.mark.parametrize(
    "pruner", [Magnitude(), Wanda(), SparseGPT(block_size=16)], ids=lambda it: type(it).__name__
)
def test_every_layer_of_every_block_has_the_planned_count(
    make_model: MakeModel, tmp_path: Path, architecture: str, pruner: Pruner
) -> None:
    """Catches a model of which only block 0 is pruned, layers that are silently skipped, and touched embeddings."""
    for pattern in (Unstructured(), KeptOfGroup(kept=2, group=4)):
        model = make_model(architecture)
        before = state_of(model.model)
        rows, masks = block_loop(
            model, tmp_path / type(pattern).__name__, pruner=pruner, pattern=pattern, sparsity=0.5
        ).run()
        weights = _prunable(model)
        reported = {f"{row['block']}.{name}": layer for row in rows for name, layer in row["layers"].items()}
        assert set(reported) == set(weights)
        for name, weight in weights.items():
            index, _, layer = name.partition(".")
            zeros = weight == 0
            assert int(zeros.sum()) == weight.numel() // 2, name
            assert torch.equal(zeros, ~masks[int(index)][layer]), name
            assert reported[name]["removed"] == weight.numel() // 2
            assert reported[name]["measured"] == reported[name]["planned"] == 0.5
        ours = {weight.untyped_storage().data_ptr() for weight in weights.values()}
        parameters = dict(model.model.named_parameters())
        pruned = {name for name, own in parameters.items() if own.untyped_storage().data_ptr() in ours}
        assert changed(before, model.model) == pruned


@EVERY
@pytest.mark.parametrize("technique", ["br", "br_gp", "br_gp_cr"])
def test_reconstruction_lowers_its_loss_and_holds_the_masks(
    make_model: MakeModel, tmp_path: Path, architecture: str, technique: str
) -> None:
    """Catches training that goes nowhere, weights that come back to life, and models that save as something else."""
    model = make_model(architecture)
    before = state_of(model.model)
    rows, masks = block_loop(model, tmp_path, technique=trained_preset(technique)).run()
    windows = {training["window"]: training["epoch_losses"] for row in rows for training in row["training"]}
    assert len(windows) == len(model.blocks) + (technique == "br_gp_cr")
    assert all(losses[-1] < losses[0] for losses in windows.values()), windows
    _masked_are_zero(model, masks)
    inside = {
        name
        for name, _ in model.model.named_parameters()
        if any(_owns(model, name, block) for block in model.blocks)
    }
    assert changed(before, model.model) <= inside
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in model.model.parameters()
    )

    model.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    tokens = some_texts().probes[0].tokens_NT
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model.logits(tokens))
    assert changed(state_of(model.model), loaded) == set()


def _owns(model: LoadedModel, name: str, block: nn.Module) -> bool:
    parameter = dict(model.model.named_parameters())[name]
    return any(parameter is own for own in block.parameters())


def _masked_are_zero(model: LoadedModel, masks: dict[int, dict[str, torch.Tensor]]) -> None:
    for index, layers in masks.items():
        for name, keep in layers.items():
            weight = model.linears[index][name].stored
            assert not weight[~keep].any()
            assert int((~keep).sum()) == weight.numel() // 2


@EVERY
def test_half_precision_keeps_every_dtype(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    """Catches training in float32 that leaves a parameter or buffer of the block in another dtype than it had."""
    model = make_model(architecture, dtype="bfloat16")
    before = state_of(model.model)
    rows, masks = block_loop(model, tmp_path, technique=trained_preset("br_gp", epochs=2)).run()
    dtypes = {name: tensor.dtype for name, tensor in before.items()}
    assert {name: tensor.dtype for name, tensor in model.model.state_dict().items()} == dtypes
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
    buffers = make_model(architecture, dtype="bfloat16").model.named_buffers()
    assert {name: tensor.dtype for name, tensor in buffers} == {
        name: tensor.dtype for name, tensor in model.model.named_buffers()
    }
    _masked_are_zero(model, masks)
    for row in rows:
        (training,) = row["training"]
        assert training["epoch_losses"][-1] < training["epoch_losses"][0]


def test_blocks_behind_a_wrong_path_are_refused(make_model: MakeModel) -> None:
    """Catches a list of modules that holds some of the blocks only: what is outside it would be left dense."""
    model = make_model("llama")
    half = LoadedModel(
        model.name,
        model.model,
        model.tokenizer,
        nn.ModuleList([*model.blocks, nn.Identity()]),
        model.plan,
        {},
    )
    with pytest.raises(RunError, match="blocks_path"):
        half.embed(some_texts().mask[0].tokens_NT)


def test_keep_all_leaves_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a dense row of comparison that is not dense."""
    model = make_model("llama")
    before = state_of(model.model)
    rows, _ = block_loop(model, tmp_path, pruner=KeepAll(), sparsity=0.0).run()
    assert changed(before, model.model) == set()
    assert all(layer["removed"] == 0 for row in rows for layer in row["layers"].values())
