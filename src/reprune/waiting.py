"""Which runs wait for a sweep that is under way, told to whoever asks how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from reprune.files import is_held, read_json, sha256_of_json, write_json

RECORDS, PLACES = "sweeps", "runs"
"""Below what sweeps keep in their output folder: a record a sweep, and a file a point that says which run it is."""


@contextmanager
def under_way(sweep_folder: Path, points: Mapping[str, str]) -> Iterator[None]:
    """Hold, while the sweep goes on, that these points (key to run id) belong to it."""
    record = sweep_folder / RECORDS / f"{sha256_of_json(sorted(points))}.json"
    write_json(record, {"points": dict(points)})
    lock = FileLock(record.with_suffix(".lock"))
    try:
        # Whoever asks how far the sweep is holds the lock for a moment.
        lock.acquire(timeout=1)
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
        record.parents[2] / _run_of(record.parents[1] / PLACES / f"{key}.json", planned)
        for record in records
        if is_held(record.with_suffix(".lock"))
        for key, planned in read_json(record)["points"].items()
    }


def _run_of(place: Path, planned: str) -> str:
    return str(read_json(place)["run"]) if place.is_file() else planned
