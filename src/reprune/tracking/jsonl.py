"""metrics.jsonl in the run folder: always written, whatever else tracks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprune.tracking.contract import RunInfo, Tracker


class JsonlTracker:
    """Appends a line a call to `metrics.jsonl`, flushed, so that a killed run's lines are there."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], *, step: Mapping[str, int]) -> None:
        """See Tracker."""
        self._write({**step, **metrics})

    def finish(self, summary: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker; the blocks have a file of their own."""
        self._write(dict(summary))

    def _write(self, row: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps({"unix_time_s": round(time.time(), 3), **row}, allow_nan=False) + "\n")
        self.stream.flush()


@dataclass(kw_only=True)
class JsonlTracking:
    """Only the JSONL files."""

    @contextmanager
    def start(self, info: RunInfo) -> Iterator[Tracker]:
        """See Tracking."""
        tracker = JsonlTracker(info.folder / "metrics.jsonl")
        try:
            yield tracker
        finally:
            tracker.stream.close()
