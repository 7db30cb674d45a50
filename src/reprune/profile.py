"""Where a run's time goes: `profile=true`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.table import Table

from reprune.resources import StageMeter
from reprune.tracking.progress import CONSOLE

TRACE = "trace.json"


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Write what every operator in the context took, in Chrome's trace format (chrome://tracing, ui.perfetto.dev).

    Stages of StageMeter are spans of it. Tracing takes time and memory of its own, so that one window is traced, not a run.
    """
    # Its own lines on when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile() as profiler:
        yield
    partial = path.with_name(f".{path.name}.part")
    profiler.export_chrome_trace(str(partial))
    os.replace(partial, path)


def told_time(seconds: float, guessed: float) -> str:
    """One line: what a run took, and how far off the guess was."""
    return (
        f"took {seconds:,.1f} s, {seconds / guessed:.2g} times the {guessed:,.1f} s guessed before it began"
    )


def show(meter: StageMeter, trace: Path) -> None:
    """Print seconds, their share and the peak of memory by stage, the longest first, and the whole."""
    table = Table("stage", box=None, pad_edge=False)
    for name in ("seconds", "share", "peak GiB", *(["device GiB"] if meter.device_peak_bytes else [])):
        table.add_column(name, justify="right")
    total = sum(meter.seconds.values())
    for stage, seconds in sorted(meter.seconds.items(), key=lambda item: -item[1]):
        peaks = [_gib(meter.peak_bytes, stage)]
        if meter.device_peak_bytes:
            peaks.append(_gib(meter.device_peak_bytes, stage))
        table.add_row(stage, f"{seconds:,.1f}", f"{seconds / total:.1%}", *peaks)
    table.add_section()
    table.add_row("whole run", f"{total:,.1f}")
    CONSOLE.print(table, highlight=False)
    if trace.is_file():
        CONSOLE.print(f"trace of one window: {trace}", highlight=False)


def _gib(peaks: Mapping[str, int], stage: str) -> str:
    return f"{peaks[stage] / 2**30:.2f}" if stage in peaks else ""
