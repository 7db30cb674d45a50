"""The block loop on every architecture: nothing changes what it should not, and nothing is skipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import reprune
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
    preset,
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


# How far the logits may be from those of one pass over all sequences, as a share of the largest: batches of another
# size add up in another order.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def _logits_from(model: LoadedModel, states_NTH: torch.Tensor, batch: int) -> torch.Tensor:
    """What the model's own norm and head make of hidden states behind its last block."""
    rows = states_NTH.split(batch)
    remaining = iter(rows)

    def put_in(module: nn.Module, inputs: Any, output: Any) -> Any:
        states = next(remaining)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = model.blocks[-1].register_forward_hook(put_in)
    try:
        return torch.cat([model.logits(torch.zeros(part.shape[:2], dtype=torch.long)) for part in rows])
    finally:
        handle.remove()


@EVERY
@pytest.mark.parametrize(
    ("dtype", "batch"), [("float32", 1), ("float32", 3), ("bfloat16", 3), ("float16", 1)]
)
def test_sparsity_zero_is_the_plain_forward(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    dtype: str,
    batch: int,
) -> None:
    """Catches `out[0]` on a tensor, a growing cache, block 0's arguments for all blocks, touched weights, and states
    of half precision that are kept or read in another dtype.
    """
    texts = some_texts()
    model = make_model(architecture, dtype=dtype)
    before = state_of(model.model)
    monkeypatch.setitem(device.TOKENS_A_PASS, "cpu", batch * texts.mask[0].tokens_NT.shape[1])
    loop = block_loop(model, tmp_path, texts=texts, sparsity=0.0)
    rows, masks = loop.run()
    assert changed(before, model.model) == set()
    assert len(rows) == len(model.blocks)
    for row in rows:
        errors = _errors(row)
        assert errors == [0.0] * len(errors)
        assert len(errors) == 6
    assert all(keep.all() for layers in masks.values() for keep in layers.values())
    chains = Chains(model, texts.all, Stores(model.plan.dtype, 32, tmp_path, on_disk=False))
    for block in range(len(model.blocks)):
        chains.advance_dense(block)
    for text in texts.all:
        size = model.plan.sequences_a_pass(text.tokens_NT.shape[1])
        for block, plain in enumerate(block_outputs(model, text.tokens_NT, size)):
            assert torch.equal(chains.dense[block + 1][text.key].states_NTH, plain)
        streamed = _logits_from(model, chains.dense[len(model.blocks)][text.key].states_NTH, size)
        assert streamed.dtype == model.plan.dtype
        assert torch.equal(streamed, torch.cat([model.logits(part) for part in text.tokens_NT.split(size)]))
        whole = model.logits(text.tokens_NT)
        assert float((streamed - whole).abs().max()) <= TOLERANCE[dtype] * float(whole.abs().max())


def _errors(row: dict[str, Any]) -> list[float]:
    return [value for texts in row["after"].values() for text in texts.values() for value in text.values()]


RECONSTRUCTED = ("br", "br_gp", "br_gp_cr", "least_squares", "submodule")
# Where the dense chain is the target, the right-hand side of a layer's least squares is a second product of the same
# numbers: equal to rounding, and so are the weights.
RELATIVE = {"float32": 1e-8, "bfloat16": 3e-4, "float16": 1e-5}
HALF = [(name, dtype) for name in ("llama", "gpt2", "mixtral") for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize(("architecture", "dtype"), [*((name, "float32") for name in ARCHITECTURES), *HALF])
def test_reconstruction_at_sparsity_zero_has_nothing_to_do(
    make_model: MakeModel, tmp_path: Path, architecture: str, dtype: str
) -> None:
    """Catches an optimiser that divides a gradient of rounding errors by its own root: full steps away from the dense
    model, to a relative error of 1e-2 where experts are called with other batches, and 1e-4 in half precision.
    """
    model = make_model(architecture, num_blocks=2, dtype=dtype)
    before, texts = state_of(model.model), some_texts(num_sequences=2, length=6)
    for name in RECONSTRUCTED:
        quick = {} if name == "least_squares" else {"epochs": 2, "batch_size": 2}
        technique = preset(name, **quick)
        rows, _ = block_loop(model, tmp_path / name, texts=texts, sparsity=0.0, technique=technique).run()
        assert {error for row in rows for error in _errors(row)} == {0.0}, name
        assert changed(before, model.model) == set(), name
        assert [training for row in rows for training in row["training"]] == []
    if not any(view.is_expert for view in model.linears[0].values()):
        technique = preset("least_squares", target_chain="dense")
        rows, _ = block_loop(model, tmp_path / "pairs", texts=texts, sparsity=0.0, technique=technique).run()
        relative = [text["relative"] for row in rows for role in row["after"].values() for text in role.values()]  # fmt: skip
        assert max(relative) <= RELATIVE[dtype]


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
    """Catches a model of which only block 0 is pruned, layers that are silently skipped, groups of four that run along
    the outputs, and touched routers, norms, embeddings or heads.
    """
    two, three = KeptOfGroup(kept=2, group=4), KeptOfGroup(kept=3, group=4)
    for number, (pattern, sparsity) in enumerate([(Unstructured(), 0.5), (two, 0.5), (three, 0.25)]):
        model = make_model(architecture, num_blocks=2)
        before = state_of(model.model)
        rows, masks = block_loop(
            model, tmp_path / str(number), pruner=pruner, pattern=pattern, sparsity=sparsity
        ).run()
        weights = _prunable(model)
        reported = {f"{row['block']}.{name}": layer for row in rows for name, layer in row["layers"].items()}
        assert set(reported) == set(weights)
        for name, weight in weights.items():
            index, _, layer = name.partition(".")
            zeros, removed = weight == 0, round(sparsity * weight.numel())
            assert int(zeros.sum()) == removed, name
            assert torch.equal(zeros, ~masks[int(index)][layer]), name
            assert reported[name]["removed"] == removed
            assert reported[name]["measured"] == reported[name]["planned"] == sparsity
            if isinstance(pattern, KeptOfGroup):
                along_inputs = zeros.T if _stores_inputs_first(model, int(index), layer) else zeros
                assert {int(count) for count in along_inputs.reshape(-1, 4).sum(dim=1)} == {4 - pattern.kept}
        ours = {weight.untyped_storage().data_ptr() for weight in weights.values()}
        parameters = dict(model.model.named_parameters())
        pruned = {name for name, own in parameters.items() if own.untyped_storage().data_ptr() in ours}
        assert changed(before, model.model) == pruned
        embeddings = (model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight)
        assert not any(own.untyped_storage().data_ptr() in ours for own in embeddings)


def _stores_inputs_first(model: LoadedModel, block: int, layer: str) -> bool:
    """Whether a weight is [d_in, d_out]: Conv1D by its class, fused experts by what they say of themselves."""
    path = layer if ".experts." not in layer else layer.rsplit(".", 2)[0]
    module = model.blocks[block].get_submodule(path)
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


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
    # A window's objective is the error behind its last block, where that is measured against the dense chain.
    measured = {"br": [], "br_gp": rows, "br_gp_cr": rows[-1:]}[technique]
    assert all(_trained_error(row["after"]) < _trained_error(row["before"]) for row in measured)
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


def _trained_error(errors: dict[str, Any]) -> float:
    """The mean error over all sequences that were trained on: 6 of one text, 3 of the other."""
    found = errors["calibration"]
    assert set(found) == {"mask", "more"}
    return float(6 * found["mask"]["error"] + 3 * found["more"]["error"]) / 9


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


# A program that is called as a model is.
FRIENDS = {"git"}


def _architectures_in(text: str) -> set[str]:
    """Causal language models and their families (qwen of qwen2) named in a source text: by a word, by a part of
    names_like_this and NamesLikeThis, or, if several words make up the name, with nothing between them.
    """
    words = re.findall(r"[A-Za-z][A-Za-z0-9_-]*", text)
    parts = [re.findall(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z]+[0-9]*|[0-9]+", word) for word in words]
    spellings = {"_".join(own).lower() for own in parts} | {word.lower().replace("-", "_") for word in words}
    separate = "".join(f"_{spelling}_\n" for spelling in spellings)
    together = separate.replace("_", "")
    models = {name.lower().replace("-", "_") for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    # Of gpt2 and emu3 nothing is left that could not stand for something else.
    families = {name.rstrip("0123456789") for name in models if "_" not in name}
    found = set()
    for name in models | {family for family in families if len(family) > 3}:
        if f"_{name}_" in separate or ("_" in name and name.replace("_", "") in together):
            found.add(name)
    return found - FRIENDS


def test_only_the_model_package_names_architectures() -> None:
    """Catches code, messages and examples for one architecture outside the place that is there for them."""
    root = Path(reprune.__file__).parent
    sources = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in root.rglob("*.py")}
    assert len(sources) > 50
    found = {path: _architectures_in(text) for path, text in sources.items()}
    assert {path: names for path, names in found.items() if names and not path.startswith("model/")} == {}
    assert {"llama", "opt", "gpt2"} <= found["model/tiny.py"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("if config.model_type == 'opt':", "opt"),
        ("blocks = {'gpt2': 'transformer.h'}", "gpt2"),
        ("class LlamaBlocks:", "llama"),
        ("def is_qwen3_moe(model):", "qwen3_moe"),
        ("isinstance(block, GPTNeoXLayer)", "gpt_neox"),
        ("# as in Gemma models", "gemma"),
        ("from reprune.pruning.sparsegpt import SparseGPT", None),
        ("optimiser, options, adopted = alphabet, phases, coherent", None),
        ("subprocess.run(['git', 'rev-parse'])", None),
    ],
)
def test_names_are_told_from_words(text: str, name: str | None) -> None:
    """Guards the test above: it finds names however they are spelt, and no words that look like them."""
    found = _architectures_in(text)
    assert name in found if name else found == set()
