"""Seconds and peak memory by stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch.profiler import record_function

from reprune.model.device import DevicePlan

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class StageMeter:
    """Adds up seconds, and keeps the high-water mark of host and device memory, for each named stage.

    On Linux the kernel's own high-water mark is reset at the start of a stage; elsewhere memory is sampled.
    """

    def __init__(self, plan: DevicePlan) -> None:
        self.plan = plan
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.device_peak_bytes: dict[str, int] = {}

    def state(self) -> dict[str, dict[str, float]]:
        """What has been measured so far, to be kept with a run that may be killed."""
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        peaks: dict[str, float] = {**self.peak_bytes}
        return {"seconds": seconds, "peak_bytes": peaks, "device_peak_bytes": {**self.device_peak_bytes}}

    def go_on_from(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Add what an earlier attempt measured, as `state` gives it."""
        for name, value in state["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        for mine, theirs in ((self.peak_bytes, "peak_bytes"), (self.device_peak_bytes, "device_peak_bytes")):
            for name, peak in state[theirs].items():
                mine[name] = max(mine.get(name, 0), int(peak))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the context to `name`; stages do not nest."""
        self.plan.reset_peak()
        start = time.perf_counter()
        with _HighWater() as mark, record_function(name):
            try:
                yield
                self.plan.synchronise()
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), mark.bytes)
        device = self.plan.peak_bytes()
        if device is not None:
            self.device_peak_bytes[name] = max(self.device_peak_bytes.get(name, 0), device)


class _HighWater:
    """Peak resident memory of this process within a context."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> _HighWater:
        if _CLEAR.exists():
            _CLEAR.write_text("5")
        else:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self._sampler is None:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            self.bytes = int(line.split()[1]) * 1024
        else:
            self._done.set()
            self._sampler.join()
