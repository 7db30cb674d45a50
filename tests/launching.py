"""What tests of launchers share: a sweep's command as a process of its own, killed or not, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

import reprune
from helpers import overrides_for
from reprune.files import read_json

PATIENCE_S = 600
NOT_THE_SAME_TWICE = r"^(folder|command|config/output_dir|peak_memory_bytes|seconds(/.*)?)$"


def launch(output_dir: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """Begin the sweep of a tiny run's overrides and these. The process leads a group of its own, as at a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "reprune.run", "-m", *overrides_for(output_dir, *more)],
        env={**os.environ, "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def ended(driver: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a driver: its exit code and all it said."""
    said, _ = driver.communicate(timeout=PATIENCE_S)
    return driver.returncode, said


def wait_until(found: Callable[[], Any], what: str, driver: subprocess.Popen[str] | None = None) -> Any:
    """The first thing found that is true; fails where the driver, if there is one, ends before."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        result = found()
        if result:
            return result
        assert driver is None or driver.poll() is None, f"before {what}: {driver.communicate()[0]}"
        time.sleep(0.005)
    raise AssertionError(f"not in {PATIENCE_S} s: {what}")


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie, which nobody may ever wait for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def running(output_dir: Path) -> dict[str, Mapping[str, Any]]:
    """By id of every run that says it goes on: what it says."""
    found = {}
    for path in output_dir.glob("*/status.json"):
        try:
            facts = read_json(path)
        except FileNotFoundError:
            continue
        if facts["state"] == "running" and alive(facts["pid"]):
            found[path.parent.name] = facts
    return found


def finished(output_dir: Path) -> int:
    """How many runs have a result."""
    return len(list(output_dir.glob("*/result.json")))


def at_block(output_dir: Path, block: int) -> Mapping[str, Any]:
    """Wait for any run to have frozen that many blocks; what it says of itself."""

    def found() -> Mapping[str, Any] | None:
        return next((facts for facts in running(output_dir).values() if facts.get("block", 0) >= block), None)

    facts = wait_until(found, f"a run at block {block} in {output_dir}")
    assert facts is not None
    return facts  # type: ignore[no-any-return]


def kill(pid: int) -> None:
    """As the kernel does when memory runs out."""
    os.kill(pid, signal.SIGKILL)


def wait_for_the_end_of(pid: int) -> None:
    """A process whose parent is gone ends by itself."""
    wait_until(lambda: not alive(pid), f"the end of process {pid}")


def frame(output_dir: Path) -> pd.DataFrame:
    """The runs, in order, without times, memory and places."""
    found = reprune.results(output_dir).sort_values("config_hash").reset_index(drop=True)
    return found.drop(columns=found.filter(regex=NOT_THE_SAME_TWICE).columns)
