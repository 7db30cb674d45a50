"""Rows through a model, as many at once as the device has room for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from reprune.errors import RunError
from reprune.model.device import release_memory

LOG = logging.getLogger("reprune")
T = TypeVar("T")


def in_batches(
    rows_NT: Tensor, size: int, run: Callable[[Tensor], T], notes: list[str], what: str
) -> Iterator[tuple[slice, T]]:
    """What `run` makes of at most `size` rows at a time, in order, with where they stand.

    Where the device runs out of memory the size is halved for the rest, which is logged and added to `notes`; RunError
    when a single row does not fit.
    """
    start = 0
    while start < len(rows_NT):
        where = slice(start, min(start + size, len(rows_NT)))
        made = attempt(partial(run, rows_NT[where]))
        if made is None:
            size = halved(size, notes, what)
            continue
        yield where, made[0]
        start = where.stop


def attempt(run: Callable[[], T]) -> tuple[T] | None:
    """What `run` returns, in a tuple of one; None where the device ran out of memory, which is then given back."""
    try:
        return (run(),)
    except torch.OutOfMemoryError:
        pass
    # Only here, behind the handler, no frame of the failed pass holds on to its tensors.
    release_memory()
    return None


def halved(size: int, notes: list[str], what: str) -> int:
    """Half of a batch that did not fit, told and noted; RunError when it was one row."""
    if size == 1:
        raise RunError(
            f"{what}: the device is out of memory with a single row; use shorter windows or dtype=bfloat16"
        )
    note = f"{what}: the device is out of memory with {size} rows at once, going on with {size // 2}"
    LOG.warning(note)
    notes.append(note)
    return size // 2
