"""Bad input is refused before any weight is loaded, in words that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from safetensors.torch import save_file

import reprune.check
import reprune.compose
import reprune.compose_errors
import reprune.config_files
import reprune.model.loading
from helpers import TINY, overrides_for, perplexity_on, plan_of, write_documents
from reprune import pipeline, run
from reprune.errors import ConfigError
from reprune.model.tiny import TinyModel


@dataclass(frozen=True)
class Bad:
    """Overrides on top of a tiny run, the key that the message must name, and words that must be in it."""

    overrides: str
    key: str
    words: tuple[str, ...] = field(default=())


TABLE = [
    # Unknown options: the nearest one is named.
    Bad("pruner=wannda", "pruner", ("no such option", "wannda", "sparsegpt", "did you mean 'wanda'?")),
    Bad("model=tinny", "model", ("no such option", "tinny", "smollm2_135m", "did you mean 'tiny'?")),
    Bad("calibration=vocabulry", "calibration", ("no such option", "did you mean 'vocabulary'?")),
    Bad("calibration@reconstruction_data=wbe", "calibration", ("no such option", "did you mean 'web'?")),
    Bad("calibration@probes.held_out=wikki", "calibration", ("no such option", "did you mean 'wiki'?")),
    Bad("pattern=2of4", "pattern", ("no such option", "2of4", "2to4", "did you mean '2to4'?")),
    Bad("reconstruction=br_pg", "reconstruction", ("no such option", "br_gp_cr", "did you mean 'br_gp'?")),
    Bad("evaluation=perplexty", "evaluation", ("no such option", "did you mean 'perplexity'?")),
    Bad("tracking=wandbb", "tracking", ("no such option", "did you mean 'wandb'?")),
    Bad("schedule=oneshot", "schedule", ("no such option", "did you mean 'one_shot'?")),
    Bad("experiments=quickstrat", "experiments", ("no such option", "did you mean 'quickstart'?")),
    Bad("arm=br_gp_rc", "arm", ("no such option", "did you mean 'br_gp_cr'?")),
    # Unknown keys, top level and nested.
    Bad("sparsty=0.5", "sparsty", ("unknown key", "0.5", "sparsity", "did you mean 'sparsity'?")),
    Bad("+sparsty=0.5", "sparsty", ("unknown key", "0.5", "did you mean 'sparsity'?")),
    Bad("+foo=1", "foo", ("unknown key", "1", "sparsity, targets")),
    Bad("pruner.dampp=1", "pruner.dampp", ("unknown key", "1", "damp, block_size", "did you mean 'damp'?")),
    Bad("+pruner.dampp=1", "pruner.dampp", ("unknown key", "1", "damp, block_size", "did you mean 'damp'?")),
    Bad("+reconstruction.widow=2", "reconstruction.widow", ("unknown key", "2", "stride", "did you mean 'window'?")),
    Bad("reconstruction.learning_rat=1", "reconstruction.learning_rat", ("did you mean 'learning_rate'?",)),
    Bad("+probes.held_out.lenght=2", "probes.held_out.lenght", ("unknown key", "did you mean 'length'?")),
    Bad("+export.modle=true", "export.modle", ("unknown key", "true", "did you mean 'model'?")),
    # Wrong types.
    Bad("calibration.num_sequences=abc", "calibration.num_sequences", ("wrong type", "'abc' (str)", "int")),
    Bad("calibration.num_sequences=2.5", "calibration.num_sequences", ("wrong type", "2.5 (float)", "int")),
    Bad("calibration.bos=each", "calibration.bos", ("'each'", "each_window, as_tokenised")),
    Bad("calibration.cut=frist", "calibration.cut", ("'frist'", "crop, pack, first", "did you mean 'first'?")),
    Bad("probes={}", "probes", ("changes nothing", "held_out", "probes.held_out=null")),
    Bad("seed=x", "seed", ("x", "int")),
    Bad("sparsity=half", "sparsity", ("half", "float")),
    Bad("dry_run=perhaps", "dry_run", ("perhaps", "bool")),
    Bad("export.model=perhaps", "export.model", ("perhaps",)),
    Bad("pruner=5", "pruner", ("no such option", "5", "wanda")),
    Bad("reconstruction.betas=[0.9]", "reconstruction.betas", ("0.9", "two numbers")),
    Bad("reconstruction.betas=[0.9,1.5]", "reconstruction.betas", ("1.5", "two numbers")),
    Bad("reconstruction.input_chain=sparce", "reconstruction.input_chain", ("'sparce'", "sparse, dense")),
    Bad("reconstruction.loss=mae", "reconstruction.loss", ("mae", "mse, relative_mse, cosine", "mse")),
    Bad("reconstruction.trainable=al", "reconstruction.trainable", ("al", "linears", "did you mean 'all'?")),
    Bad("reconstruction.optimiser=adamv", "reconstruction.optimiser", ("adamv", "adamw, adam, rmsprop, sgd")),
    Bad("tracking=wandb tracking.mode=of", "tracking.mode", ("'of'", "offline, online, disabled")),
    # Ranges.
    Bad("sparsity=1", "sparsity", ("1.0", "0 ≤ sparsity < 1")),
    Bad("sparsity=1.5", "sparsity", ("1.5", "0 ≤ sparsity < 1")),
    Bad("sparsity=-0.1", "sparsity", ("-0.1", "0 ≤ sparsity < 1")),
    Bad("sparsity=nan", "sparsity", ("nan", "0 ≤ sparsity < 1")),
    Bad("sparsity=50", "sparsity", ("50.0", "0 ≤ sparsity < 1")),
    Bad("sparsity=2 pruner=none", "sparsity", ("2.0", "0 ≤ sparsity < 1")),
    Bad("pattern=2to4 pattern.kept=5", "pattern.kept", ("kept=5, group=4", "kept ≤ group")),
    Bad("pattern=2to4 pattern.group=0", "pattern.group", ("greater than zero", "0")),
    Bad("pattern=2to4 sparsity=0.6", "sparsity", ("2:4", "0.6", "0.5")),
    Bad("pattern=2to4 pattern.kept=1 sparsity=0.5", "sparsity", ("1:4", "0.5", "0.75")),
    Bad("pattern=2to4 pattern.group=5 pruner=wanda", "pattern.group", ("32 inputs", "groups of 5", "divisor")),
    Bad("pattern=2to4 pattern.group=32 pruner.block_size=48", "pruner.block_size", ("multiple", "32", "48")),
    Bad("reconstruction.window=4 reconstruction.stride=1", "reconstruction.window", ("3 blocks", "4")),
    Bad("reconstruction.stride=2", "reconstruction.stride", ("window of 1", "2")),
    *(
        Bad(f"{key}={value}", key, (str(value), "greater than zero"))
        for key in (
            "calibration.num_sequences", "calibration.length", "reconstruction.window", "reconstruction.batch_size",
            "reconstruction.learning_rate", "model.num_blocks", "pruner.block_size", "threads",
        )
        for value in (0, -1)
    ),
    *(
        Bad(f"{key}=-1", key, ("-1", "must not be negative"))
        for key in ("seed", "seed_data", "seed_training", "reconstruction.epochs", "reconstruction.weight_decay", "pruner.damp")
    ),
    Bad("calibration.length=1", "calibration.length", ("BOS", "1", "2 or more")),
    Bad("calibration.length=600", "calibration.length", ("model's context", "600", "at most 512")),
    Bad("reconstruction.learning_rate=inf", "reconstruction.learning_rate", ("inf", "finite")),
    Bad("reconstruction.lr_schedule=reduce_lr_on_plateau", "reconstruction.lr_schedule", ("linear, cosine, cosine_with_restarts, polynomial, constant",)),
    Bad("model.architecture=llamma", "model.architecture", ("llamma", "did you mean 'llama'?")),
    Bad("model.architecture=vit", "model.architecture", ("vit", "no such causal language model")),
    Bad("model.hidden_size=30", "model.hidden_size", ("30", "divide by 8")),
    # Devices and dtypes.
    Bad("device=gpu", "device", ("unknown device", "gpu", "auto, cpu", "did you mean")),
    Bad("device=cuda:99", "device", ("not there", "cuda:99", "auto, cpu")),
    Bad("dtype=float23", "dtype", ("float23", "bfloat16", "did you mean 'float32'?")),
    # Texts and models that are not there.
    Bad("calibration=domain calibration.domain=wikki", "calibration.domain", ("wikki", "did you mean 'wiki'?")),
    Bad("calibration=tokens ~calibration.num_sequences ~calibration.length", "calibration.path", ("has to be set",)),
    Bad("calibration=same", "calibration", ("cannot be it",)),
    Bad("model=local", "model.path", ("has to be set", "conf/model/local.yaml")),
    Bad("model=local model.path=/no/such/folder", "model.path", ("no such folder", "/no/such/folder")),
    Bad("model.blocks_path=model.layer", "model.blocks_path", ("model.layer", "model.layers")),
    # Several at once, and what is not Hydra's grammar.
    Bad("pruner=", "pruner", ()),
    Bad("seed=[1", "", ("seed=[1", "cannot be read")),
    Bad("~seed", "seed", ("has to be there",)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and a model that must not be loaded."""

    def forbidden(*_: object, **__: object) -> NoReturn:
        raise AssertionError("weights were loaded")

    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "load_model", forbidden)
    monkeypatch.setattr(reprune.model.loading, "load_model", forbidden)


def _refused(tmp_path: Path, *more: str) -> ConfigError:
    """The error that a tiny run with these overrides gives; nothing may have been written."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    return caught.value


def _readable(error: ConfigError) -> str:
    screen = error.screen()
    assert "Traceback" not in screen
    assert len(screen.splitlines()) < 25
    assert "<class" not in screen
    assert "Error(" not in screen
    return screen


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.overrides)
def test_refused_with_a_clear_message(tmp_path: Path, bad: Bad) -> None:
    """Catches bad input that runs, or fails late, or says nothing that helps."""
    error = _refused(tmp_path, *bad.overrides.split())
    screen = _readable(error)
    assert error.key == bad.key, screen
    for word in bad.words:
        assert word in screen, screen


def test_key_in_an_experiment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a slip in a file that the user does not see on the command line: the file is named."""
    root = tmp_path / "root"
    for folder in ("conf", "experiments"):
        shutil.copytree(reprune.compose.config_root() / folder, root / folder)
    slips = {"top": "sparsty: 0.5", "nested": "pruner:\n  dampp: 0.1", "option": "pruner:\n  damp: much"}
    for name, body in slips.items():
        (root / "experiments" / f"{name}.yaml").write_text(
            f"# @package _global_\nexperiment: {name}\n{body}\n"
        )
    for module in (reprune.compose, reprune.compose_errors, reprune.config_files):
        monkeypatch.setattr(module, "config_root", lambda: root)
    top = _refused(tmp_path, "experiments=top")
    assert top.key == "sparsty"
    assert "experiments/top.yaml" in _readable(top)
    assert "did you mean 'sparsity'?" in top.screen()
    nested = _refused(tmp_path, "experiments=nested")
    assert nested.key == "pruner.dampp"
    assert "experiments/nested.yaml" in _readable(nested)
    assert "did you mean 'damp'?" in nested.screen()
    typed = _refused(tmp_path, "experiments=option")
    assert typed.key == "pruner.damp"
    assert "'much' (str)" in _readable(typed)


def _text_run(path: Path) -> list[str]:
    return ["calibration=domain", f"calibration.domain={path}"]


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("no such text",)),
        (b"", ("empty",)),
        (b" \n\n \n", ("empty",)),
        (b"good so far \xff\xfe", ("not UTF-8", "0xff", "offset 12", "iconv")),
    ],
    ids=["missing", "empty", "blank", "latin1"],
)
def test_text_that_cannot_be_read(
    tmp_path: Path, role: str, content: bytes | None, words: tuple[str, ...]
) -> None:
    """Catches a text read as something else, or not at all, with the model already in memory."""
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    error = _refused(tmp_path, *(_text_run(path) if role == "calibration" else perplexity_on(mine=path)))
    assert error.key == (
        "calibration.domain" if role == "calibration" else "evaluation.perplexity.texts.mine"
    )
    for word in (*words, str(path)):
        assert word in _readable(error)


def test_text_that_is_too_short_says_how_much_there_is(tmp_path: Path) -> None:
    """Catches a message without the two counts that tell what to change."""
    path = tmp_path / "mine.jsonl"
    write_documents(path, count=12, words=10)
    error = _refused(tmp_path, *_text_run(path), "calibration.num_sequences=500")
    assert error.key == "calibration.num_sequences"
    for word in ("500 windows of 15 tokens", "documents", "tokens, the longest", "at most"):
        assert word in _readable(error)
    error = _refused(tmp_path, *perplexity_on(mine=path), "evaluation.perplexity.num_windows=500")
    assert error.key == "evaluation.perplexity.texts.mine"
    for word in ("500 windows of 15 tokens", "12 documents", "at most"):
        assert word in _readable(error)


def test_jsonl_without_the_field(tmp_path: Path) -> None:
    """Catches lines that are skipped because they have another field."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n', encoding="utf-8")
    error = _refused(tmp_path, *_text_run(path))
    for word in ("line 2", "'text'", "txt"):
        assert word in _readable(error)
    path.write_text('{"text": "a"}\nnot json\n', encoding="utf-8")
    assert "line 2 is not JSON" in _readable(_refused(tmp_path, *_text_run(path)))


TOKENS = [
    "calibration=tokens",
    "~calibration.num_sequences",
    "~calibration.length",
    "~calibration@probes.held_out",
]


def test_token_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    """Catches an index error deep in the embedding."""
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.tensor([[5, 6, 258]])}, path)
    error = _refused(tmp_path, *TOKENS, f"calibration.path={path}")
    assert error.key == "calibration.path"
    for word in ("outside the vocabulary", "258", "0 … 257"):
        assert word in _readable(error)
    path.write_bytes(b"no tensors at all")
    assert "not a safetensors file" in _readable(_refused(tmp_path, *TOKENS, f"calibration.path={path}"))


@pytest.fixture
def saved_model(tmp_path: Path) -> Path:
    """A saved model, to be damaged."""
    folder = tmp_path / "a model"
    shutil.copytree(TinyModel().folder(), folder)
    return folder


def _local(folder: Path) -> list[str]:
    kept = [override for override in TINY if override != "model=tiny"]
    return [*kept, "model=local", f"model.path='{folder}'"]


def _refused_model(tmp_path: Path, folder: Path, *more: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        reprune.check.check(
            reprune.compose.compose_run([*_local(folder), f"output_dir={tmp_path / 'out'}", *more])
        )
    return caught.value


def test_model_folder_without_weights(tmp_path: Path, saved_model: Path) -> None:
    """Catches a model of random weights in place of the missing ones."""
    (saved_model / "model.safetensors").unlink()
    error = _refused_model(tmp_path, saved_model)
    assert error.key == "model.path"
    for word in ("no weights", str(saved_model), "*.safetensors"):
        assert word in _readable(error)
    (saved_model / "config.json").unlink()
    assert "config.json" in _readable(_refused_model(tmp_path, saved_model))


def test_model_folder_with_a_pickle(tmp_path: Path, saved_model: Path) -> None:
    """Catches a pickle that is read: it could run anything."""
    (saved_model / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "the pickle ran"),))

    torch.save(Evil(), saved_model / "pytorch_model.bin")
    error = _refused_model(tmp_path, saved_model)
    assert error.key == "model.path"
    for word in ("pickled", "pytorch_model.bin", "*.safetensors", "model.allow_bin=true"):
        assert word in _readable(error)
    assert not (tmp_path / "the pickle ran").exists()


def test_model_folder_with_a_shard_missing(tmp_path: Path, saved_model: Path) -> None:
    """Catches a download that stopped half-way."""
    (saved_model / "model.safetensors").rename(saved_model / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (saved_model / "model.safetensors.index.json").write_text(json.dumps(index))
    error = _refused_model(tmp_path, saved_model)
    assert "model-2.safetensors" in _readable(error)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_output_dir_that_is_no_folder(tmp_path: Path, below: str) -> None:
    """Catches a run that works for hours and then has no place to write."""
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / below
    with pytest.raises(ConfigError) as caught:
        plan_of(place)
    assert caught.value.key == "output_dir"
    for word in ("cannot be written", str(place), "writable folder"):
        assert word in _readable(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_dir_without_permission(tmp_path: Path) -> None:
    """Catches the same with a folder that belongs to somebody else."""
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "closed" / "out")
    assert caught.value.key == "output_dir"


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that is found in the middle of a run."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    error = _refused(tmp_path)
    assert error.key == "output_dir"
    for word in ("GiB on disk", "0.0 GiB are free", str(tmp_path / "out"), "another output_dir"):
        assert word in _readable(error)


def test_memory_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process that the kernel kills without a word."""
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(100 * 2**20))
    error = _refused(tmp_path)
    assert error.key == "model"
    for word in ("GiB of memory", "0.1 GiB are free", "tiny", "dtype=bfloat16"):
        assert word in _readable(error)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reprune", *arguments])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        ["pruner=wannda"],
        ["sparsty=0.5"],
        ["-m", "pruner=wanda,magnitude", "sparsity=0.5,1.5"],
        ["pruner=wanda,magnitude"],
        ["--cfg", "job", "pruner=wannda"],
    ],
    ids=" ".join,
)
def test_exit_code_and_screen(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches another exit code than 2, more than a screen, and a sweep that begins before all its points are good."""
    code = _main(monkeypatch, *overrides_for(tmp_path / "out"), *arguments)
    told = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in told.err + told.out
    assert 0 < len(told.err.splitlines()) < 25
    assert not (tmp_path / "out").exists()


def test_the_command_itself(tmp_path: Path) -> None:
    """Catches what only a process shows: Hydra's own exit code 1, its screens, and libraries that chatter."""
    command = [
        sys.executable,
        "-m",
        "reprune.run",
        *overrides_for(tmp_path / "out"),
        "reconstruction.window=9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len((done.stderr + done.stdout).strip().splitlines()) < 25
    for word in ("reconstruction.window", "9", "3 blocks"):
        assert word in done.stderr
    assert not (tmp_path / "out").exists()
