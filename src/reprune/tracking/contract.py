"""The contract of trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run at its start."""

    id: str
    folder: Path
    group: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Receives metrics while a run goes on, and what it comes to at the end."""

    def log(self, metrics: Mapping[str, float], *, step: Mapping[str, int]) -> None:
        """Metrics at a step named by its own counter, e.g. {'block/index': 7}."""
        ...

    def finish(self, summary: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> None:
        """The run's flat metrics, and a table with a row a block."""
        ...


class Tracking(Protocol):
    """An option of the group `tracking`."""

    def start(self, info: RunInfo) -> AbstractContextManager[Tracker]:
        """Open a tracker for the time of a context; an error in the context marks the tracked run as failed."""
        ...
