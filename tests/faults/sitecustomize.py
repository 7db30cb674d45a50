"""Faults for processes that know nothing of them: with this folder first in PYTHONPATH Python runs this at its start.

The environment says which: FAULT (a kind of `arm`), FAULT_AT, FAULT_UNDER, FAULT_LOG. Without FAULT nothing happens.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import Any


def arm(kind: str, at: int, under: str, log: str) -> None:
    """Let this process meet a fault at its `at`-th rename of a finished file into the folder `under`; `log` gets a line.

    `before`: the power goes between the write and the rename. `behind`: it goes after the rename, and a file that was
    not flushed to disk is left empty. `full`: the disk is full from then on, for its children too.
    """
    replace, fsync = os.replace, os.fsync
    flushed: set[tuple[int, int]] = set()
    renames = 0

    def flush(handle: Any) -> None:
        fsync(handle)
        found = os.fstat(handle)
        flushed.add((found.st_dev, found.st_ino))

    def rename(source: Any, target: Any, **more: Any) -> None:
        nonlocal renames
        renames += str(target).startswith(under)
        if renames != at or not str(target).startswith(under):
            replace(source, target, **more)
            return
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{kind} {os.getpid()} {target}\n")
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            replace(source, target, **more)
            return
        if kind == "behind":
            found = os.stat(source)
            replace(source, target, **more)
            if (found.st_dev, found.st_ino) not in flushed:
                os.truncate(target, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = flush, rename


if "FAULT" in os.environ:
    arm(
        os.environ["FAULT"],
        int(os.environ["FAULT_AT"]),
        os.environ["FAULT_UNDER"],
        os.environ["FAULT_LOG"],
    )
