"""What a run has finished, on disk before the next window begins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from reprune.engine.stored_masks import KIND, StoredMasks, key_of, pack
from reprune.model.loading import LoadedModel
from reprune.tensor_files import write_tensors

OPEN = "open.safetensors"


@dataclass
class Progress:
    """Windows finished so far, rows of the frozen blocks, what is known of pruned but not yet frozen blocks, their masks.

    `measured` is the seconds and memory that the finished windows took, as resources.StageMeter gives them.
    """

    windows: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    pending: dict[int, dict[str, Any]] = field(default_factory=dict)
    masks: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


class RunState:
    """Weights and masks of finished windows in one folder.

    A window's frozen blocks go to `frozen_NNNN.safetensors`; then `open.safetensors`, which holds the blocks that the
    next window trains again, is replaced and says how many windows are done. Whatever a killed run left beside that
    is not read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(
        self,
        windows: int,
        model: LoadedModel,
        frozen: range,
        still_open: range,
        rows: list[dict[str, Any]],
        pending: Mapping[int, dict[str, Any]],
        masks: Mapping[int, Mapping[str, Tensor]],
        measured: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Write the state after `windows` windows; `rows` are those of the blocks in `frozen`."""
        written = {"windows": str(windows), "rows": json.dumps(rows)}
        if len(frozen):
            write_tensors(self.folder / _name(windows), _tensors(model, frozen, masks), written)
        kept = {
            "windows": str(windows),
            "pending": json.dumps({str(block): pending[block] for block in still_open}),
            "measured": json.dumps(measured),
        }
        write_tensors(self.folder / OPEN, _tensors(model, still_open, masks), kept)

    def rest(
        self, windows: int, model: LoadedModel, frozen: Iterable[int], still_open: Iterable[int]
    ) -> None:
        """Have blocks that rest on disk read what was committed after `windows` windows from now on."""
        _moved(model, frozen, self.folder / _name(windows))
        _moved(model, still_open, self.folder / OPEN)

    def windows_done(self) -> int:
        """How many windows are finished."""
        if not (self.folder / OPEN).is_file():
            return 0
        with safe_open(self.folder / OPEN, framework="pt") as stream:
            return int(stream.metadata()["windows"])

    def restore(self, model: LoadedModel) -> Progress:
        """Put the finished weights into the model's blocks, or say where they rest, and return the rest of the state."""
        progress = Progress(windows=self.windows_done())
        for path in self._frozen(progress.windows):
            progress.rows += json.loads(_load(path, model)["rows"])
        if progress.windows:
            metadata = _load(self.folder / OPEN, model)
            progress.masks = {
                block: dict(layers) for block, layers in StoredMasks([self.folder / OPEN], model).items()
            }
            pending = json.loads(metadata["pending"])
            progress.measured = json.loads(metadata["measured"])
            progress.pending = {int(block): row for block, row in pending.items()}
        return progress

    def masks(self, model: LoadedModel) -> StoredMasks:
        """The keep masks of all blocks that a finished window pruned."""
        done = self.windows_done()
        return StoredMasks([*self._frozen(done), *([self.folder / OPEN] if done else [])], model)

    def _frozen(self, windows: int) -> list[Path]:
        """The files of blocks that those windows froze."""
        files = (self.folder / _name(number) for number in range(1, windows + 1))
        return [path for path in files if path.is_file()]


def _tensors(
    model: LoadedModel, which: range, masks: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    tensors = {}
    for block in which:
        for name, tensor in model.blocks[block].state_dict().items():
            tensors[f"weights.{block}.{name}"] = tensor
        for name, keep in masks.get(block, {}).items():
            tensors[key_of(block, name)] = pack(keep)
    return tensors


def _name(windows: int) -> str:
    return f"frozen_{windows:04d}.safetensors"


def _moved(model: LoadedModel, blocks: Iterable[int], path: Path) -> None:
    """Have blocks that rest on disk read from there from now on."""
    if model.on_disk is not None:
        for block in blocks:
            model.on_disk.moved(model.blocks[block], path, f"weights.{block}.")


def _load(path: Path, model: LoadedModel) -> dict[str, str]:
    with safe_open(path, framework="pt") as stream:
        for key in stream.keys():  # noqa: SIM118 (a safetensors file, not a dict)
            kind, number, name = key.split(".", 2)
            block = int(number)
            if kind == KIND:
                continue
            if model.on_disk is not None:
                _moved(model, [block], path)
            else:
                model.blocks[block].state_dict()[name].copy_(stream.get_tensor(key))
        metadata: dict[str, str] = stream.metadata()
    return metadata
