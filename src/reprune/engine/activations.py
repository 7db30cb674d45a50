"""Stores of activations: one boundary between two blocks, one text; in memory or mapped to a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from reprune.errors import RunError
from reprune.model.device import DevicePlan
from reprune.ranks import ALONE, LeftAloneError, Ranks


class Activations:
    """Hidden states [num_sequences, length, hidden] of one text at one boundary; rests off the device.

    `positions_NT` are those of the text, see `calibration.source.TextSet`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        file: Path | None,
        positions_NT: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._file = file
        self.positions_NT = positions_NT
        if file is None:
            self.states_NTH = torch.empty(shape, dtype=dtype)
        else:
            size = shape[0] * shape[1] * shape[2]
            if ranks.first:
                _reserve(file, size * torch.finfo(dtype).bits // 8)
            ranks.wait()
            self.states_NTH = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)

    def __len__(self) -> int:
        return len(self.states_NTH)

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return int(self.states_NTH.shape[1])

    def batches(self, size: int, within: range | None = None) -> Iterator[slice]:
        """Consecutive slices of at most `size` sequences: of all of them, or of those in `within`."""
        within = range(len(self)) if within is None else within
        for start in range(within.start, within.stop, size):
            yield slice(start, min(start + size, within.stop))

    def positions(self, where: slice) -> Tensor | None:
        """The positions of some sequences, on the host."""
        return None if self.positions_NT is None else self.positions_NT[where]

    def read(self, where: slice | Tensor, plan: DevicePlan) -> Tensor:
        """Some sequences, on the device."""
        return self.states_NTH[where].to(plan.device)

    def write(self, where: slice, states: Tensor) -> None:
        """Store some sequences."""
        self.states_NTH[where] = states.to(self.states_NTH.device, self.states_NTH.dtype)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None and self._file is not None:
            self._file.unlink(missing_ok=True)


def _reserve(file: Path, num_bytes: int) -> None:
    """Take the space now: a disk that fills up under a mapping kills the process instead of raising OSError."""
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, num_bytes)
        else:
            stream.truncate(num_bytes)


@dataclass
class Stores:
    """Makes stores: in host memory, or in files below `folder` when the plan found them too large for it.

    Several processes share them, as files that all have mapped: what one writes, all read once they waited for it.
    """

    dtype: torch.dtype
    hidden_size: int
    folder: Path
    on_disk: bool
    ranks: Ranks = ALONE
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def apart(self) -> Stores:
        """Those of this process alone."""
        return replace(
            self,
            folder=self.folder / f"process_{self.ranks.number}",
            ranks=ALONE,
            _numbers=itertools.count(),
        )

    def new(
        self,
        num_sequences: int,
        length: int,
        positions_NT: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Activations:
        """An empty store for a text of that size, of another `dtype` where one is given."""
        dtype = dtype or self.dtype
        shape = (num_sequences, length, self.hidden_size)
        if not self.on_disk:
            assert not self.ranks.several
            return Activations(shape, dtype, None, positions_NT)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{next(self._numbers)}.activations"
        try:
            return Activations(shape, dtype, file, positions_NT, self.ranks)
        except LeftAloneError:
            raise
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"activations cannot be stored in {self.folder}: {error}; free disk space"
            ) from error


def compare(dense: Activations, pruned: Activations, ranks: Ranks = ALONE) -> dict[str, float]:
    """The paper's errᵢ and its relative twin between two stores of one boundary.

    `error` = ‖dense − pruned‖² / (N·T·H) (arXiv 2406.15524, §3); `relative` = mean over tokens of ‖e_t‖²/‖h_t‖², which
    tokens with massive activations cannot dominate. Summed in float64, a sequence at a time, by each process its share.
    """
    squares, relative, tokens = 0.0, 0.0, 0
    for row in ranks.share(len(dense)):
        target, student = dense.states_NTH[row], pruned.states_NTH[row]
        difference = (target.double() - student.double()).square().sum(dim=-1)
        squares += float(difference.sum())
        relative += float((difference / target.double().square().sum(dim=-1)).sum())
        tokens += len(target)
    squares, relative, tokens = map(sum, zip(*ranks.gathered([squares, relative, tokens]), strict=True))
    return {"error": squares / (tokens * dense.states_NTH.shape[-1]), "relative": relative / tokens}
