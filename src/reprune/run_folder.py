"""A run's folder: its name from what changes a number, its lock, its status, its record."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from reprune.errors import HeldError
from reprune.files import is_held, read_json, sha256_of_json, write_json, write_text

if TYPE_CHECKING:
    from reprune.model.device import DevicePlan

PACKAGES = (
    "reprune",
    "torch",
    "transformers",
    "hydra-core",
    "omegaconf",
    "wandb",
    "datasets",
    "pandas",
    "numpy",
)
HASH_LENGTH = 12
KEPT = ("begun_s", "num_blocks", "first_block", "blocks_begun_s")
"""Of an attempt: unix time of its beginning, blocks of the model, blocks done before it, unix time when it went on with them."""


def config_hash(identity: Mapping[str, Any]) -> str:
    """Hash of everything that changes a number."""
    return sha256_of_json(dict(identity))[:HASH_LENGTH]


@dataclass(frozen=True)
class Status:
    """How far a run is: 'finished', 'running', 'failed', 'interrupted', 'killed' or 'empty', and in words."""

    state: str
    words: str


class RunFolder:
    """`output_dir/<label>-<hash>`; a folder of the same hash under another label is the same run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def of(output_dir: Path, label: str, hash_: str) -> RunFolder:
        """The folder of a run, which need not exist yet."""
        there = sorted(output_dir.glob(f"*-{hash_}"))
        return RunFolder(there[0] if there else output_dir / f"{label}-{hash_}")

    @property
    def id(self) -> str:
        """The run's id."""
        return self.path.name

    @property
    def state(self) -> Path:
        """Weights and masks of finished windows."""
        return self.path / "state"

    @property
    def finished(self) -> bool:
        """Whether the record is complete."""
        return (self.path / "result.json").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. HeldError, naming the holder, when another one has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            # Whoever asks how the run is doing holds the lock for a moment.
            lock.acquire(timeout=1)
        except Timeout as error:
            holder = self.facts()
            raise HeldError(
                f"{self.path} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}; "
                "wait for it, or choose another output_dir"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def mark(self, state: str, **facts: Any) -> None:
        """Write how the run is doing; the facts in `KEPT` stay as the mark before had them unless they are given."""
        facts = {
            **{name: value for name, value in self.facts().items() if name in KEPT},
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "unix_time_s": time.time(),
            **facts,
        }
        write_json(self.path / "status.json", facts)

    def facts(self) -> dict[str, Any]:
        """What `mark` wrote last; empty for a run that was never begun."""
        path = self.path / "status.json"
        content: dict[str, Any] = read_json(path) if path.is_file() else {}
        return content

    def status(self) -> Status:
        """The run's state; a run that says 'running' while nobody holds its lock was killed."""
        if self.finished:
            return Status("finished", "finished")
        facts = self.facts()
        if not facts:
            return Status("empty", "not begun")
        place = f" at block {facts['block']}" if "block" in facts else ""
        if facts["state"] in {"running", "finished"}:
            # 'finished' without a result: the process died between the two.
            held = is_held(self.path / ".lock")
            return Status("running" if held else "killed", f"{'running' if held else 'killed'}{place}")
        reason = f": {facts['error']}" if "error" in facts else ""
        return Status(facts["state"], f"{facts['state']}{place}{reason}")

    def write_setup(self, config_yaml: str, environment: Mapping[str, Any]) -> None:
        """config.yaml and environment.json."""
        write_text(self.path / "config.yaml", config_yaml)
        write_json(self.path / "environment.json", dict(environment))

    def write_blocks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """blocks.jsonl, a row a frozen block."""
        write_text(
            self.path / "blocks.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        )

    def blocks(self) -> list[dict[str, Any]]:
        """The rows of blocks.jsonl."""
        path = self.path / "blocks.jsonl"
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.is_file()
            else []
        )


def environment_of(plan: DevicePlan) -> dict[str, Any]:
    """Versions, commit, machine and device."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": plan.name,
        "visible_devices": plan.visible,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "threads": plan.num_threads,
        "processes": plan.ranks.count,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this code runs from, with '-dirty' when it was changed; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
