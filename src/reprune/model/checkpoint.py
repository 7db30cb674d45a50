"""What every kind of model source has in common: a folder of safetensors, and the checks on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from reprune.cache import cached_folder
from reprune.errors import ConfigError, RunError
from reprune.files import sha256_of_file, sha256_of_json
from reprune.tensor_files import write_tensors


class ModelSource(Protocol):
    """Where a model comes from. Everything but `folder` is cheap and loads no weights."""

    name: str
    blocks_path: str | None
    trust_remote_code: bool

    def identity(self) -> dict[str, Any]:
        """What makes it this model and no other: content hashes or a revision."""
        ...

    def description(self) -> Path:
        """A folder with the config and the tokenizer, no weights needed."""
        ...

    def folder(self) -> Path:
        """A folder with config, tokenizer and safetensors weights."""
        ...


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint folder."""

    paths: tuple[Path, ...]
    pickled: bool


def weight_files(folder: Path, key: str, allow_bin: bool) -> WeightFiles:
    """The safetensors of `folder`, else its `.bin` files if `allow_bin`.

    Raises ConfigError for a folder without config, without weights, or with pickles that were not allowed.
    """
    if not folder.is_dir():
        raise ConfigError(key, "no such folder", value=folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            key, "this folder has no config.json", value=folder, accepted="a saved transformers model"
        )
    safe = _safetensors(folder, key)
    if safe:
        for path in safe:
            _check_header(path, key)
        return WeightFiles(safe, pickled=False)
    pickles = tuple(sorted(folder.glob("pytorch_model*.bin")))
    if pickles and not allow_bin:
        raise ConfigError(
            key,
            f"this folder has pickled weights only ({pickles[0].name}), which can run code when they are read",
            value=folder,
            accepted="*.safetensors",
            hint="save it with save_pretrained(), or set model.allow_bin=true to convert it once, as tensors only",
        )
    if pickles:
        return WeightFiles(pickles, pickled=True)
    raise ConfigError(key, "this folder has no weights", value=folder, accepted="model*.safetensors")


def _check_header(path: Path, key: str) -> None:
    """A file that was cut off says so in its header's sizes."""
    try:
        with safe_open(path, framework="pt") as stream:
            stream.keys()
    except SafetensorError as error:
        raise ConfigError(
            key, f"{path.name} is damaged or not whole: {error}", value=path, hint="copy or download it again"
        ) from error


def _safetensors(folder: Path, key: str) -> tuple[Path, ...]:
    """The files that transformers reads: the single one, else those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if index.is_file():
        named = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        missing = sorted(path.name for path in named if not path.is_file())
        if missing:
            raise ConfigError(
                key, f"weight files named in the index are missing: {', '.join(missing)}", value=folder
            )
        return tuple(sorted(named))
    shards = sorted(folder.glob("model-*.safetensors"))
    if shards:
        raise ConfigError(
            key,
            f"its weight files ({shards[0].name} …) have no index",
            value=folder,
            accepted="model.safetensors, or model.safetensors.index.json and the files it names",
        )
    return ()


def content_identity(files: WeightFiles, config: Path) -> dict[str, Any]:
    """Hash of config and weights, remembered by path, size and time of change: 13 GB are hashed once."""
    hashes = {}
    for path in (config, *files.paths):
        stat = path.stat()
        key = {"path": str(path.resolve()), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}

        def compute(folder: Path, path: Path = path) -> None:
            (folder / "sha256").write_text(sha256_of_file(path))

        hashes[path.name] = (cached_folder("file_hashes", key, compute) / "sha256").read_text()
    return {"content": sha256_of_json(hashes)}


def converted_from_pickle(folder: Path, files: WeightFiles) -> Path:
    """A copy of `folder` with safetensors instead of `.bin`; read as tensors only, converted once."""
    key = {"kind": "from_bin", **content_identity(files, folder / "config.json")}

    def convert(target: Path) -> None:
        from transformers import AutoModelForCausalLM

        state: dict[str, torch.Tensor] = {}
        for path in files.paths:
            state.update(torch.load(path, map_location="cpu", weights_only=True))
        # Names and ties of an old pickle are the library's business: let it load the state, then save.
        unshared = {name: tensor.clone() for name, tensor in state.items()}
        staging = target / "staging"
        staging.mkdir()
        for path in folder.iterdir():
            if path.suffix in {".json", ".txt", ".model", ".jinja"} and "index" not in path.name:
                (staging / path.name).write_bytes(path.read_bytes())
                (target / path.name).write_bytes(path.read_bytes())
        write_tensors(staging / "model.safetensors", unshared, {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(
            staging, dtype="auto", local_files_only=True, trust_remote_code=False
        )
        model.save_pretrained(target)
        for path in staging.iterdir():
            path.unlink()
        staging.rmdir()

    return cached_folder("models", key, convert)


def read_weights(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The transformers model of a folder, in host memory, without gradients. RunError where weights are missing."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    # transformers fills what is missing with random numbers.
    wrong = sorted({*told["missing_keys"], *(key[0] for key in told["mismatched_keys"])})
    if wrong:
        raise RunError(
            f"{folder}: {len(wrong)} weights are missing or have another shape than the config says "
            f"({', '.join(wrong[:3])} …); save the model again with save_pretrained()"
        )
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
