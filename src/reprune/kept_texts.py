"""The texts that a run reads are the same in all its processes, and in all its attempts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from reprune.calibration.roles import Texts
from reprune.calibration.tokens import POSITIONS
from reprune.errors import RunError
from reprune.ranks import Ranks
from reprune.tensor_files import write_tensors


def check_alike(texts: Texts, ranks: Ranks) -> None:
    """RunError unless the other processes, which read theirs once the first has its own, have the same texts."""
    mine = [text.key for text in texts.all]
    if any(theirs != mine for theirs in ranks.gathered(mine)):
        raise RunError(
            "the processes of this run read different texts: one of their sources changes while it is read"
        )


def keep_texts(path: Path, texts: Texts, going_on: bool) -> None:
    """The very token ids of every text, int64 [sequences, length], as 'role/name'; the mask data also as `input_ids`.

    Where windows hold several documents, their positions lie beside them, as calibration=tokens reads them.

    RunError when a run that goes on would do so with other texts than it began with.
    """
    tensors = {f"{text.role}/{text.name}": text.tokens_NT for text in texts.all}
    places = {f"{text.role}/{text.name}": text.positions_NT for text in texts.all}
    if len(texts.mask) == 1:
        tensors["input_ids"] = texts.mask[0].tokens_NT.clone()
        places["input_ids"] = texts.mask[0].positions_NT
    tensors |= {f"{name}{POSITIONS}": place.clone() for name, place in places.items() if place is not None}
    if not going_on:
        write_tensors(path, tensors)
        return
    begun = load_file(path)
    changed = [name for name in tensors if name not in begun or not torch.equal(begun[name], tensors[name])]
    if changed or len(begun) != len(tensors):
        raise RunError(
            f"{path}: this run began with other texts ({', '.join(changed) or 'fewer now'}), and text that the model "
            "writes may differ between thread counts and versions; go on as it began, or remove the folder"
        )
