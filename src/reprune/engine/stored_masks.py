"""The masks of finished blocks, which rest on disk with the blocks' weights: a bit a weight there, a byte in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from reprune.model.loading import LoadedModel

KIND = "masks"


class StoredMasks(Mapping[int, Mapping[str, Tensor]]):
    """Keep masks (bool, stored layout) by block and layer, a block read from its file whenever it is asked for.

    A block of which nothing is pruned has an entry too.
    """

    def __init__(self, files: Sequence[Path], model: LoadedModel) -> None:
        self._model = model
        self._file: dict[int, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as stream:
                self._file |= {int(key.split(".", 2)[1]): path for key in stream.keys()}  # noqa: SIM118 (a safetensors file, not a dict)

    def __getitem__(self, block: int) -> Mapping[str, Tensor]:
        """The masks of a block, in the model's order."""
        found = {}
        with safe_open(self._file[block], framework="pt") as stream:
            there = set(stream.keys())
            for name, view in self._model.linears[block].items():
                if key_of(block, name) in there:
                    found[name] = unpack(stream.get_tensor(key_of(block, name)), view.stored.shape)
        return found

    def __iter__(self) -> Iterator[int]:
        """The blocks, in order."""
        return iter(sorted(self._file))

    def __len__(self) -> int:
        """How many blocks."""
        return len(self._file)


def key_of(block: int, name: str) -> str:
    """The key of a layer's mask in a file of the state."""
    return f"{KIND}.{block}.{name}"


def pack(keep: Tensor) -> Tensor:
    """A bool mask as bits, uint8."""
    return torch.from_numpy(np.packbits(keep.cpu().contiguous().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The bool mask of `shape` that `pack` made bits of."""
    flat = np.unpackbits(bits.numpy(), count=shape.numel())
    return torch.from_numpy(flat.view(bool)).reshape(shape)
