"""A run that dies at any moment goes on and ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    overrides_for,
    perplexity_on,
    plan_of,
    run_tiny,
    state_bytes,
    timeless,
    wandb_records,
    write_documents,
)
from reprune import files, pipeline, tensor_files
from reprune.errors import RunError
from reprune.run_folder import RunFolder
from reprune.run_plan import RunPlan

METHODS = {
    "none": ["pruner=wanda", "reconstruction=none", "reconstruction.epochs=0"],
    "br_gp_cr": ["pruner=sparsegpt", "reconstruction=br_gp_cr"],
    "br_window_3_stride_2": [
        "pruner=random", "reconstruction=br", "reconstruction.window=3", "reconstruction.stride=2",
        "model.num_blocks=5",
    ],
}  # fmt: skip


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


@dataclass(frozen=True)
class Outcome:
    """What has to be equal, whatever happened on the way."""

    tensors: dict[str, bytes]
    rows: list[dict[str, Any]]
    metrics: dict[str, float]
    sparsity: dict[str, Any]


def _outcome(plan: RunPlan, result: dict[str, Any]) -> Outcome:
    rows: list[dict[str, Any]] = timeless(plan.folder.blocks())
    return Outcome(state_bytes(plan.folder.path), rows, result["metrics"], result["sparsity"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def evaluation(tmp_path: Path) -> list[str]:
    """Perplexity on a text of the test's own."""
    write_documents(tmp_path / "held_out.jsonl", seed=3)
    return perplexity_on(mine=tmp_path / "held_out.jsonl")


@contextmanager
def _fault_at(number: int, fault: Callable[[], BaseException], lasting: bool = False) -> Iterator[list[str]]:
    """Let the `number`-th atomic write raise (and all that follow, if `lasting`); yields the names written."""
    real = files.write_atomically
    names: list[str] = []

    def write(path: Path, content: Callable[[Path], None]) -> None:
        names.append(path.name)
        if len(names) == number or (lasting and len(names) > number):
            raise fault()
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        for module in (files, tensor_files):
            patch.setattr(module, "write_atomically", write)
        yield names


def _disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_litter(folder: Path) -> None:
    assert not list(folder.rglob("*.part")), "a half-written file was left"


@pytest.mark.parametrize("method", METHODS)
def test_death_at_every_write(tmp_path: Path, method: str, evaluation: list[str]) -> None:
    """Catches every order of writes in which a death loses or repeats work, or mixes two windows' weights."""
    choices = [*METHODS[method], *evaluation]
    plan = plan_of(tmp_path / "undisturbed", *choices)
    with _fault_at(0, Killed) as names:
        undisturbed = _outcome(plan, pipeline.run(plan))
    assert {"status.json", "config.yaml", "open.safetensors", "blocks.jsonl", "result.json"} <= set(names)
    assert len(undisturbed.rows) >= 3
    for number in range(1, len(names) + 1):
        shutil.rmtree(tmp_path / "cache" / "dense_results")
        plan = plan_of(tmp_path / str(number), *choices)
        with _fault_at(number, Killed), pytest.raises(Killed):
            pipeline.run(plan)
        assert RunFolder(plan.folder.path).status().state in {"killed", "empty"}, names[number - 1]
        resumed = _outcome(plan, pipeline.run(plan))
        assert resumed == undisturbed, f"death at write {number}, {names[number - 1]}"
        _no_litter(plan.folder.path)


def test_death_at_every_write_and_again_at_the_next(tmp_path: Path, evaluation: list[str]) -> None:
    """Catches a resume that is only right for a run that died once."""
    choices = [*METHODS["br_gp_cr"], *evaluation]
    undisturbed = _outcome(*run_tiny(tmp_path / "undisturbed", *choices))
    plan = plan_of(tmp_path / "unlucky", *choices)
    deaths = 0
    # Each attempt gets a little further than the one before: five writes are the setup, four a window.
    for number in range(4, 60, 3):
        try:
            with _fault_at(number, Killed):
                result = pipeline.run(plan)
            break
        except Killed:
            deaths += 1
    assert deaths >= 3
    assert _outcome(plan, result) == undisturbed


def test_full_disk_at_every_write(tmp_path: Path, evaluation: list[str]) -> None:
    """Catches a full disk that shows a traceback, leaves a folder that cannot be read, or spoils what was there."""
    choices = [*METHODS["br_gp_cr"], *evaluation]
    plan = plan_of(tmp_path / "undisturbed", *choices)
    with _fault_at(0, Killed) as names:
        undisturbed = _outcome(plan, pipeline.run(plan))
    for number in range(1, len(names) + 1):
        shutil.rmtree(tmp_path / "cache" / "dense_results")
        plan = plan_of(tmp_path / str(number), *choices)
        with _fault_at(number, _disk_full), pytest.raises(RunError, match="No space left") as caught:
            pipeline.run(plan)
        assert str(plan.folder.path) in str(caught.value)
        status = plan.folder.status()
        assert status.state == "failed", names[number - 1]
        assert "No space left" in status.words
        assert [row["block"] for row in plan.folder.blocks()] == list(range(len(plan.folder.blocks())))
        assert _outcome(plan, pipeline.run(plan)) == undisturbed, f"write {number}, {names[number - 1]}"


def test_disk_that_stays_full(tmp_path: Path) -> None:
    """Catches a failure to write the failure that hides what went wrong."""
    plan = plan_of(tmp_path / "a", *METHODS["br_gp_cr"])
    with _fault_at(12, _disk_full, lasting=True), pytest.raises(RunError, match="No space left"):
        pipeline.run(plan)
    status = plan.folder.status()
    assert status.state == "killed"
    assert "at block" in status.words
    undisturbed = _outcome(*run_tiny(tmp_path / "b", *METHODS["br_gp_cr"]))
    assert _outcome(plan, pipeline.run(plan)) == undisturbed


def test_writes_that_really_fail(tmp_path: Path) -> None:
    """Catches the libraries' own exceptions for a file that cannot grow: safetensors does not raise OSError."""
    plan = plan_of(tmp_path / "a", *METHODS["none"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Enough for JSON and YAML, too little for a block's weights.
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
        with pytest.raises(RunError, match=r"(?s)(cannot be written|File too large)"):
            pipeline.run(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert plan.folder.status().state == "failed"
    _no_litter(plan.folder.path)
    undisturbed = _outcome(*run_tiny(tmp_path / "b", *METHODS["none"]))
    assert _outcome(plan, pipeline.run(plan)) == undisturbed


def test_what_is_half_written_is_not_read(tmp_path: Path) -> None:
    """Catches a resume that trusts files which the last commit does not know of."""
    undisturbed = _outcome(*run_tiny(tmp_path / "a", *METHODS["br_gp_cr"]))
    plan = plan_of(tmp_path / "b", *METHODS["br_gp_cr"])

    def die_after_two(windows: int) -> None:
        if windows == 2:
            raise Killed

    with pytest.raises(Killed):
        pipeline.run(plan, die_after_two)
    state = plan.folder.state
    (state / "frozen_0003.safetensors").write_bytes(b"half a file")
    (state / ".open.safetensors.1234.part").write_bytes(b"half a file")
    assert _outcome(plan, pipeline.run(plan)) == undisturbed


FAULTS = Path(__file__).parent / "faults"
SCRIPT = """
import json, os, signal, sys
import sitecustomize
from reprune.check import check
from reprune.compose import compose_run
from reprune.pipeline import run

def kill_after(last):
    def after_commit(windows):
        if windows == last:
            os.kill(os.getpid(), signal.SIGKILL)
    return after_commit

# Importing takes seconds: do it once, then fork a process for each run.
children = []
for last, fault, overrides in json.loads(sys.argv[1]):
    children.append(os.fork())
    if children[-1] == 0:
        plan = check(compose_run(overrides))
        if fault is not None:
            sitecustomize.arm(*fault)
        run(plan, kill_after(last))
        os._exit(0)
print(json.dumps([os.waitpid(child, 0)[1] for child in children]))
"""


RENAMES = (("before", 8), ("behind", 11))


def test_real_kills(tmp_path: Path) -> None:
    """Catches what in-process faults cannot show: locks, buffers and half files of a process that is gone."""
    choices = METHODS["br_gp_cr"]
    undisturbed = _outcome(*run_tiny(tmp_path / "undisturbed", *choices))
    jobs: list[tuple[Any, ...]] = [
        (last, None, overrides_for(tmp_path / str(last), *choices)) for last in (1, 2, 3)
    ]
    # The power goes between a write and its rename, or just behind it.
    for kind, at in RENAMES:
        out = tmp_path / f"{kind}_{at}"
        fault = (kind, at, str(out), str(tmp_path / "faults.log"))
        jobs.append((None, fault, overrides_for(out, *choices)))
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    ends = json.loads(told.stdout.splitlines()[-1])
    assert [os.WTERMSIG(end) for end in ends] == [signal.SIGKILL] * len(jobs), told.stderr[-2000:]
    for kind, at in RENAMES:
        plan = plan_of(tmp_path / f"{kind}_{at}", *choices)
        assert _outcome(plan, pipeline.run(plan)) == undisturbed
    assert len((tmp_path / "faults.log").read_text().splitlines()) == len(RENAMES)
    for last in (1, 2, 3):
        plan = plan_of(tmp_path / str(last), *choices)
        # The first window of cross-block reconstruction freezes nothing.
        assert plan.folder.status().words == f"killed at block {last - 1}"
        assert _outcome(plan, pipeline.run(plan)) == undisturbed


def test_ctrl_c(tmp_path: Path) -> None:
    """Catches an interrupt that leaves an unreadable folder, a W&B run that looks alive, or no way on."""
    choices = [*METHODS["br_gp_cr"], "tracking=wandb"]
    undisturbed = _outcome(*run_tiny(tmp_path / "a", *METHODS["br_gp_cr"]))
    plan = plan_of(tmp_path / "b", *choices)

    def interrupt(windows: int) -> None:
        if windows == 2:
            raise KeyboardInterrupt

    import wandb

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(plan, interrupt)
    assert wandb.run is None, "the W&B run is still open"
    status = plan.folder.status()
    assert (status.state, status.words) == ("interrupted", "interrupted at block 1")
    assert [row["block"] for row in plan.folder.blocks()] == [0]
    lines = (plan.folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["block/index"] for line in lines] == [0]
    exits = [record["exit"] for record in wandb_records(plan.folder.path) if record["type"] == "exit"]
    assert [end.get("exit_code") for end in exits] == [1]
    assert _outcome(plan, pipeline.run(plan)) == undisturbed


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_an_end_that_is_interrupted_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Catches a run that reads as killed: another process of it died, and the signal came while it noted that it failed."""
    plan, mark, asked = plan_of(tmp_path), RunFolder.mark, list[str]()

    def interrupted(folder: RunFolder, told: str, **facts: Any) -> None:
        asked.append(told)
        if asked.count(state) == 1 and told == state:
            raise KeyboardInterrupt
        mark(folder, told, **facts)

    def fail(windows: int) -> None:
        raise RunError("left alone") if state == "failed" else KeyboardInterrupt()

    monkeypatch.setattr(RunFolder, "mark", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(plan, fail)
    assert plan.folder.status().state == state
    assert asked.count(state) == 2
