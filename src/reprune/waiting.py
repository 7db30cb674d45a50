"""Which runs wait for a sweep that is under way, told to whoever asks how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from reprune.files import is_held, read_json, sha256_of_json, write_json

RECORDS = "sweeps"
"""The folder with a record a sweep, below what a sweep keeps in its output folder."""


@contextmanager
def under_way(sweep_folder: Path, runs: Sequence[str]) -> Iterator[None]:
    """Hold, while the sweep goes on, that these runs (ids) belong to it."""
    record = sweep_folder / RECORDS / f"{sha256_of_json(sorted(runs))}.json"
    write_json(record, {"runs": list(runs)})
    lock = FileLock(record.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        # The same sweep twice at once: the other one's record says the same.
        yield
        return
    try:
        yield
    finally:
        lock.release()


def waiting(places: Sequence[Path]) -> set[Path]:
    """The folders, there or not, of the runs of every sweep that is under way below these places."""
    records = [path for place in places for path in place.rglob(f".multirun/{RECORDS}/*.json")]
    return {
        record.parents[2] / run
        for record in records
        if is_held(record.with_suffix(".lock"))
        for run in read_json(record)["runs"]
    }
