"""Masks that are there already: from a file, a run or a checkpoint, with the same result, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import overrides_for, plan_of, run_tiny, state_bytes
from reprune import run
from reprune.errors import ConfigError
from reprune.model.tiny import TinyModel
from reprune.sparsity.allocation import Layers, SizeAllocation
from reprune.sparsity.one_shot import OneShot
from support import option

LEFT = ("reconstruction=none", "reconstruction.epochs=0")
EXPORTS = ("export.model=true", "export.masks=true")
LAYER = "0.self_attn.q_proj"
KEY = f"model.layers.{LAYER}.weight"


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def wanda(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Path:
    """The folder of a run without reconstruction, model and masks exported; never written to."""
    return _pruned(tmp_path_factory.mktemp("wanda"))


def _pruned(output_dir: Path, *more: str) -> Path:
    plan, _ = run_tiny(output_dir, "pruner=wanda", *LEFT, *EXPORTS, *more)
    return plan.folder.path


def _mask(path: Path, *more: str) -> list[str]:
    return ["pruner=mask", f"pruner.path='{path}'", *more]


def _applied(output_dir: Path, path: Path, *more: str) -> Path:
    """The folder of a run that applies the masks of `path` and does not reconstruct."""
    plan, _ = run_tiny(output_dir, *_mask(path), *LEFT, *more)
    return plan.folder.path


def _without_masks(run_folder: Path, copy: Path) -> Path:
    shutil.copytree(run_folder, copy)
    shutil.rmtree(copy / "masks")
    return copy


def _weights(run_folder: Path) -> dict[str, bytes]:
    """Weights and masks of a run; from which window's file they are does not matter."""
    return {name.partition("/")[2]: held for name, held in state_bytes(run_folder).items()}


def test_every_place_gives_the_run_that_the_mask_is_from(tmp_path: Path, wanda: Path) -> None:
    """Catches masks that are transposed, shifted or mixed up between layers, whatever they are read from."""
    places = {
        "file": wanda / "masks" / "masks.safetensors",
        "folder": wanda / "masks",
        "run": wanda,
        "state": _without_masks(wanda, tmp_path / "copied run"),
        "checkpoint": wanda / "model",
    }
    found = {name: _applied(tmp_path / name, path, "export.model=true") for name, path in places.items()}
    for name, folder in found.items():
        assert _weights(folder) == _weights(wanda), name
        model = folder / "model" / "model.safetensors"
        assert model.read_bytes() == (wanda / "model" / "model.safetensors").read_bytes(), name
    assert len({folder.name for folder in found.values()}) == 1, "the same mask is the same run"


@pytest.mark.parametrize("technique", ["br", "br_gp_cr"])
def test_reconstructed_under_the_same_mask(tmp_path: Path, wanda: Path, technique: str) -> None:
    """Catches a reconstruction that starts from another mask, or moves it: wanda's own must come out the same."""
    plan, result = run_tiny(tmp_path / "mask", *_mask(wanda), f"reconstruction={technique}")
    held = _weights(plan.folder.path)
    masks = {name: bits for name, bits in _weights(wanda).items() if name.startswith("masks.")}
    assert masks.items() <= held.items()
    assert held != _weights(wanda)
    assert result["sparsity"] == json.loads((wanda / "result.json").read_text())["sparsity"]


def test_weights_of_the_checkpoint(tmp_path: Path) -> None:
    """Catches updates that are lost, or taken although only the mask was asked for."""
    updated = _pruned(tmp_path / "sparsegpt", "pruner=sparsegpt")
    taken = _applied(tmp_path / "file", updated / "model", "pruner.weights=file", "export.model=true")
    left = _applied(tmp_path / "dense", updated / "model", "export.model=true")
    assert _weights(taken) == _weights(updated)
    saved, dense, now = (
        load_file(folder / "model.safetensors")
        for folder in (updated / "model", TinyModel().folder(), left / "model")
    )
    assert (taken / "model" / "model.safetensors").read_bytes() == (
        updated / "model" / "model.safetensors"
    ).read_bytes()
    keep = saved[KEY] != 0
    assert torch.equal(now[KEY], torch.where(keep, dense[KEY], 0))
    assert not torch.equal(now[KEY], saved[KEY])
    assert left.name != taken.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_in_another_dtype(tmp_path: Path, wanda: Path, dtype: str) -> None:
    """Catches weights that are not cast, and a mask made of weights that were rounded to zero."""
    tensors = load_file(wanda / "model" / "model.safetensors")
    copied = _changed(wanda / "model", tmp_path / "half", {name: t.bfloat16() for name, t in tensors.items()})
    taken = _applied(tmp_path / "out", copied, "pruner.weights=file", f"dtype={dtype}", "export.model=true")
    now = load_file(taken / "model" / "model.safetensors")[KEY]
    assert now.dtype == getattr(torch, dtype)
    assert torch.equal(now, tensors[KEY].bfloat16().to(now.dtype))


def test_sharded_checkpoint(tmp_path: Path, wanda: Path) -> None:
    """Catches layers that are looked for in the first file only."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wanda / "model", use_safetensors=True)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    taken = _applied(tmp_path / "out", tmp_path / "sharded", "pruner.weights=file")
    assert _weights(taken) == _weights(wanda)


@pytest.mark.parametrize("place", ["masks", "state", "model", "base"])
def test_layers_that_are_stored_transposed(tmp_path: Path, place: str) -> None:
    """Catches Conv1D masks in the wrong orientation, and a checkpoint that was saved without its head."""
    from transformers import AutoModel

    gpt2 = ("model.architecture=gpt2", "model.num_blocks=1")
    own = _pruned(tmp_path / "own", *gpt2, "pattern=2to4")
    path = {"state": tmp_path / "copied", "base": tmp_path / "base"}.get(place, own / place)
    if place == "state":
        _without_masks(own, path)
    if place == "base":
        AutoModel.from_pretrained(own / "model", use_safetensors=True).save_pretrained(path)
        assert "h.0.attn.c_attn.weight" in load_file(path / "model.safetensors")
    weights = ["pruner.weights=file"] if place in ("model", "base") else []
    assert _weights(_applied(tmp_path / "mask", path, *gpt2, "pattern=2to4", *weights)) == _weights(own)


def test_sparsity_is_the_masks_own(tmp_path: Path, wanda: Path) -> None:
    """Catches a plan, or a record, that shows the sparsity of the config."""
    masks = load_file(wanda / "masks" / "masks.safetensors")
    masks = {name: keep | (index % 2 == 0) for index, (name, keep) in enumerate(sorted(masks.items()))}
    path = _saved(tmp_path / "masks.safetensors", masks)
    plan, result = run_tiny(tmp_path / "out", *_mask(path), *LEFT)
    removed = {name: float((~keep).double().mean()) for name, keep in masks.items()}
    assert plan.rounds == [pytest.approx(removed)]
    assert {0.0, 0.5} == set(plan.rounds[0].values())
    total = sum(int((~keep).sum()) for keep in masks.values()) / sum(keep.numel() for keep in masks.values())
    assert plan.sparsity == pytest.approx(total) == result["sparsity"]["total"]


@pytest.mark.parametrize("place", ["masks", "state", "model"])
def test_some_layers_of_a_larger_mask(tmp_path: Path, wanda: Path, place: str) -> None:
    """Catches masks of layers that are not to be pruned now, taken for those of another model."""
    path = _without_masks(wanda, tmp_path / "copied") if place == "state" else wanda / place
    layers = plan_of(tmp_path / "out").shapes.layers
    pruner = option("pruner", "mask", path=str(path))
    assert pruner.brings({LAYER: layers[LAYER]}, option("pattern", "unstructured"), layers) == {LAYER: 0.5}


def test_all_or_nothing_may_be_kept(tmp_path: Path, wanda: Path) -> None:
    """Catches shares of 0 and 1 that are taken for faults: such masks are legal in a file, also as uint8."""
    masks = load_file(wanda / "masks" / "masks.safetensors")
    for name, value in (("ones", 1), ("zeros", 0)):
        path = _saved(
            tmp_path / f"{name}.safetensors",
            {layer: torch.full_like(keep, value, dtype=torch.uint8) for layer, keep in masks.items()},
        )
        _, result = run_tiny(tmp_path / "out", *_mask(path), *LEFT)
        assert result["sparsity"]["total"] == 1 - value


def test_pattern_that_the_mask_conforms_to(tmp_path: Path, wanda: Path) -> None:
    """Catches masks that pass for N:M because their share is right, or because every group is alike."""
    fitting = _pruned(tmp_path / "2to4", "pattern=2to4")
    for path in (fitting, fitting / "model"):
        plan = plan_of(tmp_path / "out", *_mask(path), "pattern=2to4")
        assert plan.sparsity == 0.5
        plan_of(tmp_path / "out", *_mask(path), "pattern=4to8")
    more = _pruned(tmp_path / "3to4", "pattern=2to4", "pattern.kept=3")
    for path in (wanda, more):
        # A second time, as nothing of a refusal may be remembered.
        for _ in range(2):
            error = _refused(tmp_path, *_mask(path), "pattern=2to4")
            assert error.key == "pattern"
            for word in (LAYER, "does not conform", "kept=2, group=4", str(path), "pattern=unstructured"):
                assert word in error.screen()


def test_a_run_is_named_by_the_masks_bits(tmp_path: Path, wanda: Path) -> None:
    """Catches a run that is done twice because a folder was moved, and one that is skipped though its mask changed."""
    path = shutil.copy(wanda / "masks" / "masks.safetensors", tmp_path / "mine.safetensors")
    first = plan_of(tmp_path / "out", *_mask(path))
    moved = plan_of(tmp_path / "out", *_mask(wanda))
    assert first.folder.path == moved.folder.path
    masks = load_file(path)
    masks[LAYER][0, 0] ^= True
    _saved(path, masks)
    changed = plan_of(tmp_path / "out", *_mask(path))
    assert changed.folder.path != first.folder.path

    copied = shutil.copytree(wanda / "model", tmp_path / "copied model")
    taken = plan_of(tmp_path / "out", *_mask(wanda / "model", "pruner.weights=file"))
    again = plan_of(tmp_path / "out", *_mask(copied, "pruner.weights=file"))
    assert taken.folder.path == again.folder.path != first.folder.path
    tensors = load_file(copied / "model.safetensors")
    _saved(copied / "model.safetensors", {**tensors, KEY: 2 * tensors[KEY]})
    doubled = plan_of(tmp_path / "out", *_mask(copied, "pruner.weights=file"))
    assert doubled.folder.path != taken.folder.path
    assert plan_of(tmp_path / "out", *_mask(copied)).folder.path == first.folder.path, "the same mask"


def test_a_checkpoint_is_read_once(tmp_path: Path, wanda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 13 GB that are read again for every run that uses their mask."""
    from reprune.pruning.mask_files import Checkpoint

    plan_of(tmp_path / "out", *_mask(wanda / "model"), "pattern=unstructured")
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read again"))
    plan_of(tmp_path / "out", *_mask(wanda / "model"), "seed=5")


def _saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return path


def _changed(model: Path, copy: Path, changes: Mapping[str, Tensor]) -> Path:
    """A copy of a checkpoint with some tensors replaced or added."""
    shutil.copytree(model, copy)
    _saved(copy / "model.safetensors", {**load_file(copy / "model.safetensors"), **changes})
    return copy


def _refused(tmp_path: Path, *more: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "refused", *more)
    assert not (tmp_path / "refused").exists()
    screen = caught.value.screen()
    assert "Traceback" not in screen
    assert "<class" not in screen
    assert len(screen.splitlines()) < 25
    return caught.value


Change = Callable[[dict[str, Tensor]], object]

BAD_MASKS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (lambda masks: masks.pop(LAYER), ("1 of 21 layers", LAYER, "20 tensors")),
    "extra": (
        lambda masks: masks.update({"3.self_attn.q_proj": masks[LAYER].clone()}),
        ("1 of its names", "3.self_attn.q_proj", "model they were made for"),
    ),
    "transposed": (
        lambda masks: masks.update({"1.mlp.up_proj": masks["1.mlp.up_proj"].T}),
        ("1.mlp.up_proj", "[32, 64]", "[64, 32]"),
    ),
    "float": (lambda masks: masks.update({LAYER: masks[LAYER].float()}), (LAYER, "F32", "uint8 of 0 and 1")),
    "two": (lambda masks: masks.update({LAYER: masks[LAYER].byte() * 2}), (LAYER, "holds 2", "uint8 of 0 and 1")),
    "keys": (
        lambda masks: [masks.update({f"model.layers.{name}.weight": masks.pop(name)}) for name in list(masks)],
        ("21 of 21 layers", f"a tensor {LAYER}", "model.layers.0"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MASKS)
def test_masks_that_do_not_fit(tmp_path: Path, wanda: Path, case: str) -> None:
    """Catches layers left dense in silence, masks of another model, and numbers that are no mask."""
    masks = load_file(wanda / "masks" / "masks.safetensors")
    change, words = BAD_MASKS[case]
    change(masks)
    path = _saved(tmp_path / "masks.safetensors", masks)
    error = _refused(tmp_path, *_mask(path))
    assert error.key == "pruner.path"
    for word in (*words, str(path)):
        assert word in error.screen()


def test_paths_that_hold_no_masks(tmp_path: Path, wanda: Path) -> None:
    """Catches a path that is taken for what it is not."""
    assert _refused(tmp_path, "pruner=mask").key == "pruner.path"
    text = tmp_path / "masks.txt"
    text.write_text("no tensors")
    whole = (wanda / "masks" / "masks.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-10])
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, words in {
        tmp_path / "nowhere": ("no such file or folder", "folder of a finished run"),
        text: ("masks.txt is damaged or no safetensors file", "pickles"),
        cut: ("cut.safetensors is damaged", "copy it again"),
        folder: ("neither masks, nor a run, nor a checkpoint", "pruned checkpoint"),
    }.items():
        error = _refused(tmp_path, *_mask(path))
        assert error.key == "pruner.path"
        for word in (*words, str(path)):
            assert word in error.screen()


def test_runs_that_give_no_masks(tmp_path: Path, wanda: Path) -> None:
    """Catches the masks of the first blocks of a run that was killed, and those of a run on another model."""
    unfinished = Path(shutil.copytree(wanda, tmp_path / "unfinished"))
    (unfinished / "result.json").unlink()
    gone = _without_masks(wanda, tmp_path / "gone")
    shutil.rmtree(gone / "state")
    damaged = _without_masks(wanda, tmp_path / "damaged")
    (damaged / "state" / "open.safetensors").write_bytes(b"nothing")
    cut = _without_masks(wanda, tmp_path / "cut")
    frozen = cut / "state" / "frozen_0002.safetensors"
    frozen.write_bytes(frozen.read_bytes()[:-10])
    for path, words in {
        unfinished: ("has not finished", "goes on where it stopped"),
        gone: ("neither masks/ nor state/",),
        damaged: ("open.safetensors", "damaged"),
        cut: ("frozen_0002.safetensors is damaged",),
    }.items():
        error = _refused(tmp_path, *_mask(path))
        assert error.key == "pruner.path"
        for word in (*words, str(path)):
            assert word in error.screen()
    state = _without_masks(wanda, tmp_path / "state")
    for other, word in {
        "model.hidden_size=64": f"layer {LAYER}: [32, 32] is there, the model stores [64, 64]",
        "model.num_blocks=2": "the first is 2.mlp.down_proj",
        "model.num_blocks=4": "7 of 28 layers are missing there, the first is 3.self_attn.q_proj",
    }.items():
        for path in (state, wanda / "masks"):
            error = _refused(tmp_path, *_mask(path), other)
            assert word in error.screen()


def test_checkpoints_that_give_no_masks(tmp_path: Path, wanda: Path) -> None:
    """Catches a dense model as its own mask, pickles, and weights that say nothing by being zero."""
    model = wanda / "model"
    weight = load_file(model / "model.safetensors")[KEY]
    pickled = Path(shutil.copytree(model, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    index = Path(shutil.copytree(model, tmp_path / "index"))
    (index / "model.safetensors").rename(index / "model-1.safetensors")
    (index / "model.safetensors.index.json").write_text("{")
    shard = Path(shutil.copytree(model, tmp_path / "shard"))
    (shard / "model.safetensors").rename(shard / "model-1.safetensors")
    (shard / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    nan = torch.full_like(weight, float("nan"))
    for path, words in {
        TinyModel().folder(): ("not pruned", "21 layers", "pruner=none"),
        pickled: ("pickled weights only (pytorch_model.bin)", "save_pretrained()"),
        index: ("index of its weights is damaged",),
        shard: ("model-2.safetensors",),
        _changed(model, tmp_path / "nan", {KEY: nan}): (LAYER, "not finite"),
        _changed(model, tmp_path / "int8", {KEY: weight.to(torch.int8)}): (LAYER, "stored as I8", "bfloat16"),
        _changed(model, tmp_path / "shape", {KEY: weight[:16]}): (LAYER, "[16, 32]", "[32, 32]"),
        _changed(model, tmp_path / "blocks", {KEY.replace("0", "3"): weight}): (
            "the first is model.layers.3",
        ),
    }.items():
        error = _refused(tmp_path, *_mask(path))
        assert error.key == "pruner.path"
        for word in (*words, str(path)):
            assert word in error.screen()
    other = _refused(tmp_path, *_mask(model), "model.architecture=opt")
    assert "18 of 18 layers are missing" in other.screen()
    assert "model.decoder.layers.0" in other.screen()


def test_experts_in_one_parameter(tmp_path: Path, wanda: Path) -> None:
    """Catches a guess at the name that a checkpoint has for an expert."""
    from reprune.pruning.contract import LayerShape

    pruner = option("pruner", "mask", path=str(wanda / "model"))
    layers = {"0.mlp.experts.gate_up_proj.3": LayerShape((64, 32))}
    with pytest.raises(ConfigError) as caught:
        pruner.brings(layers, option("pattern", "unstructured"), layers)
    for word in ("0.mlp.experts.gate_up_proj.3", "expert", "folder of a finished run"):
        assert word in caught.value.screen()


def test_weights_that_are_not_there(tmp_path: Path, wanda: Path) -> None:
    """Catches dense weights in place of those that were asked for."""
    error = _refused(tmp_path, *_mask(wanda, "pruner.weights=file"))
    assert error.key == "pruner.weights"
    for word in ("only the folder of a checkpoint", "dense", f"pruner.path={wanda / 'model'}"):
        assert word in error.screen()
    error = _refused(tmp_path, *_mask(wanda / "masks", "pruner.weights=file"))
    assert error.hint is None
    assert _refused(tmp_path, *_mask(wanda, "pruner.weights=sparse")).key == "pruner.weights"


@dataclass(kw_only=True)
class Half(SizeAllocation):
    """An allocation that is not the uniform one."""

    def allocate(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """Half of everything."""
        return dict.fromkeys(layers.shapes, 0.5)


@dataclass(kw_only=True)
class TwoSteps(OneShot):
    """A schedule that is not one shot."""

    def steps(self, sparsity: float) -> list[float]:
        """Half, then all."""
        return [sparsity / 2, sparsity]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sparsity=0.5", ("0.5", "sparsity=null")),
        (f"allocation._target_={__name__}.Half", ("Half", "uniform")),
        (f"schedule._target_={__name__}.TwoSteps", ("TwoSteps", "one_shot")),
    ],
    ids=["sparsity", "allocation", "schedule"],
)
def test_choices_that_would_decide_the_mask(
    tmp_path: Path, wanda: Path, override: str, words: tuple[str, ...]
) -> None:
    """Catches a sparsity, an allocation or a schedule that is given and has no effect."""
    error = _refused(tmp_path, *_mask(wanda), override)
    assert error.key == override.split("=")[0].split(".")[0]
    for word in ("brings its own masks", *words):
        assert word in error.screen()


def test_the_command(
    tmp_path: Path, wanda: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches what only the command does: its exit code, and the name of the run's folder."""

    def main(*more: str) -> None:
        monkeypatch.setattr("sys.argv", ["reprune", *overrides_for(tmp_path / "out", *more)])
        run.main()

    with pytest.raises(SystemExit) as ended:
        main(*_mask(tmp_path / "nowhere"))
    assert ended.value.code == 2
    assert "pruner.path: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main(*_mask(wanda), *LEFT)
    assert len(list((tmp_path / "out").glob("tiny-mask-none-*/result.json"))) == 1
