"""Source `tokens`: the exact token ids of a file, as an earlier run saved them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from reprune.calibration.source import Document, TextContext, TextSource
from reprune.errors import ConfigError, did_you_mean
from reprune.files import sha256_of_file

POSITIONS = ".position_ids"
"""Behind the name of a tensor of token ids: where its documents begin."""


@dataclass(kw_only=True)
class Tokens(TextSource):
    """`path` is a safetensors file with a tensor int64 [sequences, length]; `tensor` names it.

    `num_sequences` and `length` null take all of it; fewer sequences take the first. Where the file has a tensor of that
    name with '.position_ids' behind it, as sets of packed documents have, positions begin anew as it says.
    """

    num_sequences: int | None = None
    length: int | None = None
    path: str
    tensor: str = "input_ids"

    exact: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """'tokens'."""
        return "tokens"

    def identity(self) -> dict[str, Any]:
        """Hash of the file and the tensor's name."""
        self.check("calibration")
        return {"tokens": sha256_of_file(Path(self.path)), "tensor": self.tensor}

    def read(self, key: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tensor and its positions, checked for shape and type."""
        if not Path(self.path).is_file():
            raise ConfigError(f"{key}.path", "no such file", value=self.path, accepted="a .safetensors file")
        try:
            with safe_open(self.path, framework="pt") as stream:
                names = list(stream.keys())
                found = stream.get_tensor(self.tensor) if self.tensor in names else None
                beside = f"{self.tensor}{POSITIONS}"
                positions = stream.get_tensor(beside) if beside in names else None
        except SafetensorError as error:
            raise ConfigError(f"{key}.path", f"not a safetensors file: {error}", value=self.path) from error
        if found is None:
            hint = did_you_mean(self.tensor, names)
            raise ConfigError(f"{key}.tensor", "no such tensor", value=self.tensor, accepted=names, hint=hint)
        ids: torch.Tensor = found
        if ids.dtype != torch.int64 or ids.dim() != 2 or 0 in ids.shape:
            shape = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
            raise ConfigError(
                f"{key}.tensor", "wrong shape or type", value=shape, accepted="int64 [sequences, length]"
            )
        count, length = self.num_sequences or ids.shape[0], self.length or ids.shape[1]
        if count > ids.shape[0] or length > ids.shape[1]:
            raise ConfigError(
                f"{key}.num_sequences",
                f"{count} × {length} tokens are asked for, the file has {ids.shape[0]} × {ids.shape[1]}",
            )
        if positions is not None and not _restart(positions, ids.shape):
            raise ConfigError(
                f"{key}.tensor",
                "its positions do not count from 0 in every row, one by one or anew from 0",
                value=beside,
                accepted="int64 of the shape of the token ids",
            )
        rows = ids[:count, :length].contiguous()
        return rows, None if positions is None else positions[:count, :length].contiguous()

    def check(self, key: str) -> None:
        """The file can be read."""
        self.read(key)

    def documents(self, context: TextContext) -> Iterable[Document]:
        """One document a row, ids checked against the vocabulary."""
        ids, positions = self.read(context.key)
        size = len(context.tokenizer)
        outside = (ids < 0) | (ids >= size)
        if bool(outside.any()):
            value = int(ids[outside][0])
            raise ConfigError(
                f"{context.key}.path",
                "token ids outside the vocabulary",
                value=value,
                accepted=f"0 … {size - 1}",
            )
        rows = [Document.of_tokens(row) for row in ids]
        if positions is None:
            return rows
        return [replace(row, positions=own) for row, own in zip(rows, positions, strict=True)]


def _restart(positions: torch.Tensor, shape: torch.Size) -> bool:
    if positions.shape != shape or positions.dtype != torch.int64:
        return False
    steps = positions[:, 1:] == positions[:, :-1] + 1
    return bool((positions[:, 0] == 0).all()) and bool((steps | (positions[:, 1:] == 0)).all())
