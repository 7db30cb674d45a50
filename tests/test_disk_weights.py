"""Weights of blocks that rest on disk: the same bytes as in memory, and never more than a window of blocks there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import plan_of, run_tiny, state_bytes, timeless
from reprune.engine.loop import BlockLoop
from reprune.errors import ConfigError
from reprune.memory import parse_size, plan_memory
from reprune.model import hollow
from reprune.model.description import load_tokenizer
from reprune.model.device import DevicePlan
from reprune.model.likelihood import row_losses
from reprune.model.loading import LoadedModel, load_model
from reprune.model.tiny import TinyModel
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.shapes import LIBRARIES, Sizes
from support import ARCHITECTURES, CPU, block_loop, preset, random_text, state_of

EVERY = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
NUM_BLOCKS = 4


def _model(architecture: str, on_disk: bool, dtype: torch.dtype = torch.float32) -> LoadedModel:
    source = TinyModel(architecture=architecture, num_blocks=NUM_BLOCKS, config=ARCHITECTURES[architecture])
    plan = DevicePlan(CPU, dtype, torch.get_num_threads())
    return load_model(source, load_tokenizer(source), plan, on_disk=on_disk)


def _num_there(model: LoadedModel) -> int:
    """How many blocks have weights in memory."""
    return sum(any(not it.is_meta for it in block.parameters()) for block in model.blocks)


class _Counting:
    """Notes the most blocks that were in memory at any forward pass of a block."""

    def __init__(self, model: LoadedModel) -> None:
        self.most = 0
        for block in model.blocks:
            block.register_forward_hook(lambda module, inputs, output: self._look(model))

    def _look(self, model: LoadedModel) -> None:
        self.most = max(self.most, _num_there(model))


@EVERY
def test_a_run_gives_the_same_bytes(architecture: str, tmp_path: Path) -> None:
    """Catches keys that are renamed or fused otherwise than the library does, blocks read before they are saved, and
    weights that stay in memory.
    """
    written = []
    for on_disk in (False, True):
        model = _model(architecture, on_disk)
        counting = _Counting(model)
        folder = tmp_path / str(on_disk)
        loop = block_loop(model, folder, pruner=Wanda())
        loop.run()
        written.append(state_bytes(folder))
        tokens = random_text("probe", "probe", 2, 9).tokens_NT
        with model.holding(model.model):
            written.append({"logits": model.logits(tokens).numpy().tobytes()})
        written[-1]["losses"] = row_losses(model, tokens).numpy().tobytes()
        assert not any(parameter.requires_grad for parameter in model.model.parameters())
        assert counting.most == (1 if on_disk else NUM_BLOCKS)
        assert _num_there(model) == (0 if on_disk else NUM_BLOCKS)
    assert written[0] == written[2]
    assert written[1] == written[3]


@EVERY
def test_a_saved_model_is_what_transformers_saves(architecture: str, tmp_path: Path) -> None:
    """Catches keys, configs and tied weights that plain transformers does not read back as they were."""
    saved = []
    for on_disk in (False, True):
        model = _model(architecture, on_disk, torch.bfloat16)
        block_loop(model, tmp_path / f"run_{on_disk}").run()
        folder = tmp_path / f"model_{on_disk}"
        model.save(folder)
        saved.append(folder)
    plain, sharded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        for folder in saved
    )
    assert state_of(plain).keys() == state_of(sharded).keys()
    assert all(torch.equal(tensor, state_of(sharded)[name]) for name, tensor in state_of(plain).items())
    for name in ("config.json", "generation_config.json"):
        wanted, found = ((folder / name) for folder in saved)
        assert wanted.exists() == found.exists()
        if wanted.exists():
            assert json.loads(wanted.read_text()) == json.loads(found.read_text())
    index = json.loads((saved[1] / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == NUM_BLOCKS + 1


TECHNIQUES = {
    "br_gp": (preset("br_gp", epochs=1), 1),
    "br_gp_cr": (preset("br_gp_cr", epochs=1), 2),
    "free_lunch": (preset("free_lunch", epochs=1), 2),
    "least_squares": (preset("least_squares"), 1),
    "bias_compensation": (preset("bias_compensation"), 1),
}


def _loop(model: LoadedModel, folder: Path, technique: Any) -> BlockLoop:
    return block_loop(model, folder, pruner=SparseGPT(), technique=technique)


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_reconstruction_and_resumption(name: str, tmp_path: Path) -> None:
    """Catches windows whose earlier blocks are read dense again, biases that no file holds, and a resumption that begins
    with weights of another state.
    """
    technique, most = TECHNIQUES[name]
    reference = tmp_path / "memory"
    _, wanted = _loop(_model("llama", False), reference, technique).run()
    model = _model("llama", True)
    counting = _Counting(model)
    loop, folder = _loop(model, tmp_path / "disk", technique), tmp_path / "disk"

    class Stop(Exception):  # noqa: N818 (stands for a kill)
        pass

    def stop_after_two(windows: int, rows: Any, new: Any) -> None:
        # A byte a weight: those of finished blocks would fill what weights on disk make room for.
        assert len(loop._progress.masks) <= most - 1
        if windows == 2:
            raise Stop

    loop.after_commit = stop_after_two
    with pytest.raises(Stop):
        loop.run()
    rows, masks = _loop(_model("llama", True), folder, technique).run()
    assert state_bytes(folder) == state_bytes(reference)
    assert counting.most <= most
    assert len(rows) == len(masks) == NUM_BLOCKS
    for block, layers in wanted.items():
        assert all(torch.equal(masks[block][name], keep) for name, keep in layers.items())
        assert list(masks[block]) == list(layers) == list(model.linears[block])


def test_blocks_that_share_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model whose blocks are one tensor being read as if each had its own."""
    made = hollow.hollow

    def tying(*given: Any) -> Any:
        model = made(*given)
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    monkeypatch.setattr(hollow, "hollow", tying)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight and model\.layers\.1"):
        _model("llama", True)


RUNS = {
    "gradients": ["pruner=gblm", "reconstruction=none"],
    "the model's allocation": ["pruner=wanda", "allocation=owl", "reconstruction=none"],
    "units": ["method=flap"],
    "rounds": [
        "schedule=iterative",
        "pruner=wanda",
        "reconstruction=br_gp",
        "schedule.reconstruct=each_round",
    ],
}


@pytest.mark.parametrize("name", list(RUNS))
def test_a_whole_run_does_not_tell_where_its_weights_rest(name: str, tmp_path: Path) -> None:
    """Catches a result, an evaluation or an export that depends on where weights rest, and another id for the run."""
    found = []
    for place in ("memory", "disk"):
        plan, result = run_tiny(tmp_path / place, *RUNS[name], f"memory.weights={place}", "export.model=true")
        assert plan.memory.weights == place
        del result["peak_memory_bytes"]
        model = AutoModelForCausalLM.from_pretrained(plan.folder.path / "model", local_files_only=True)
        found.append(
            (plan.folder.path.name, timeless(result), state_of(model), state_bytes(plan.folder.path))
        )
    (one_name, one, one_model, one_state), (other_name, other, other_model, other_state) = found
    assert one_name == other_name
    assert one == other
    assert one_state == other_state
    assert all(torch.equal(tensor, other_model[name]) for name, tensor in one_model.items())


def test_the_plan_counts_the_masks_that_are_in_memory(tmp_path: Path) -> None:
    """Catches masks of finished blocks that are counted, and those that an export wants all at once that are not."""
    wanda = ("pruner=wanda", "reconstruction=none", "memory.weights=disk", "memory.activations=disk")

    def room(num_blocks: int, *more: str) -> tuple[int, int]:
        plan = plan_of(tmp_path, *wanda, f"model.num_blocks={num_blocks}", *more)
        return plan.memory.host, plan.shapes.num_prunable // num_blocks

    few, a_block = room(3)
    assert room(30)[0] == few
    assert room(30, "export.masks=true")[0] == few + 29 * a_block
    # One process writes them.
    sizes = replace(SIZES, base=LIBRARIES + 2)
    assert sizes.of_processes(2).with_masks_of(3) == sizes.of_processes(2)
    assert sizes.with_masks_of(3).base == LIBRARIES + 3


GIB = 2**30
SIZES = Sizes(
    base=2 * GIB, weights=10 * GIB, weights_at_once=GIB, activations=3 * GIB, disk=5 * GIB, on_device=4 * GIB
)


def _asked(**asked: str) -> dict[str, Any]:
    return {"weights": "auto", "activations": "auto", "host_limit": None, "device_limit": None, **asked}


@pytest.mark.parametrize(
    ("limit", "weights", "activations", "host", "disk"),
    [
        ("15GiB", "memory", "memory", 15, 5),
        ("14.9GiB", "disk", "memory", 6, 5),
        ("5.9GiB", "disk", "disk", 3, 8),
        ("3GiB", "disk", "disk", 3, 8),
    ],
)
def test_what_rests_where(limit: str, weights: str, activations: str, host: int, disk: int) -> None:
    """Catches plans above the limit, and disk where memory has room."""
    plan = plan_memory(_asked(host_limit=limit), SIZES, None, "cpu")
    assert (plan.weights, plan.activations) == (weights, activations)
    assert (plan.host, plan.disk) == (host * GIB, disk * GIB)


def test_a_run_that_needs_its_whole_model() -> None:
    """Catches blocks that are let go of under a method that reads all of them."""
    plan = plan_memory(_asked(host_limit="14GiB"), SIZES, "export.compact=true", "cpu")
    assert (plan.weights, plan.activations) == ("memory", "disk")
    with pytest.raises(ConfigError, match=r"export\.compact=true needs the whole model"):
        plan_memory(_asked(host_limit="11GiB"), SIZES, "export.compact=true", "cpu")
    with pytest.raises(ConfigError, match="needs the whole model in memory"):
        plan_memory(_asked(weights="disk"), SIZES, "export.compact=true", "cpu")


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"host_limit": "2.9GiB"}, "memory.host_limit"),
        ({"device_limit": "8GiB"}, "memory.device_limit"),
    ],
)
def test_wrong_limits_are_refused(asked: dict[str, str], key: str) -> None:
    """Catches limits that no plan keeps, and that nothing would heed."""
    with pytest.raises(ConfigError) as refused:
        plan_memory(_asked(**asked), SIZES, None, "cpu")
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("host_limit", "6"),
        ("host_limit", "0GiB"),
        ("device_limit", "abc"),
        ("weights", "tape"),
        ("activations", "tape"),
    ],
)
def test_words_that_are_none_are_refused_before_a_tokenizer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, word: str
) -> None:
    """Catches amounts and places that are none, told after seconds of work."""
    monkeypatch.delattr("reprune.check.load_tokenizer")
    with pytest.raises(ConfigError) as refused:
        plan_of(tmp_path, f"memory.{name}={word}")
    assert refused.value.key == f"memory.{name}"


def test_a_device_without_room_is_told_before_the_run() -> None:
    """Catches a run that finds out on the device."""
    with pytest.raises(ConfigError, match=r"about 4\.00 GiB on the device"):
        plan_memory(_asked(device_limit="3.9GiB"), SIZES, None, "cuda")
    assert plan_memory(_asked(device_limit="4GiB"), SIZES, None, "cuda").device_limit == 4 * GIB


@pytest.mark.parametrize(
    ("asked", "number"), [("6GiB", 6 * GIB), ("500 MB", 500 * 10**6), ("1.5KiB", 1536), (None, None)]
)
def test_amounts_of_memory(asked: str | None, number: int | None) -> None:
    """Catches GB read as GiB."""
    assert parse_size(asked, "memory.host_limit") == number


def test_a_pass_that_fails_leaves_no_weights(tmp_path: Path) -> None:
    """Catches a block that stays in memory when its pass does not fit, so that the smaller one has less room."""
    model = _model("llama", True)

    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError

    handle = model.blocks[1].mlp.register_forward_pre_hook(fail)
    tokens = random_text("probe", "probe", 1, 5).tokens_NT
    with model.holding(model.model):
        with pytest.raises(torch.OutOfMemoryError):
            model.logits(tokens)
        assert _num_there(model) == 0
        handle.remove()
        assert torch.isfinite(model.logits(tokens)).all()


def test_text_that_the_model_writes_keeps_it_in_memory(tmp_path: Path) -> None:
    """Catches a model that is read from disk once a token."""
    with pytest.raises(ConfigError, match="which the model writes, needs the whole model"):
        plan_of(tmp_path, "calibration=generated", "calibration.max_new_tokens=16", "memory.weights=disk")
    with pytest.raises(ConfigError, match="for which the model writes, needs the whole model"):
        plan_of(tmp_path, "evaluation=generation", "memory.weights=disk")
