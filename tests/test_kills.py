"""Sweeps whose processes are killed: nothing is lost, nothing is done twice, the numbers stay."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import pandas as pd
import pytest

from helpers import overrides_for
from launching import at_block, ended, frame, kill, launch, running, wait_for_the_end_of, wait_until
from reprune import attempts
from reprune.attempts import MOST, attempt, counter_of
from reprune.compose import Composed, compose_run
from reprune.files import read_json

GRID = ("pruner=wanda,magnitude", "model.num_blocks=12", "reconstruction.epochs=40")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


def test_the_driver_and_its_jobs_are_killed(tmp_path: Path) -> None:
    """Catches a sweep that a dead job ends, a dead driver whose jobs go on, lost windows, and other numbers afterwards."""
    out = tmp_path / "disturbed"
    driver = launch(out, *GRID)
    first = at_block(out, 2)
    kill(first["pid"])
    second = wait_until(
        lambda: next(
            (
                facts
                for facts in running(out).values()
                if facts["pid"] != first["pid"] and facts.get("block", 0) >= 3
            ),
            None,
        ),
        "the killed run, going on",
    )
    assert second["first_block"] >= 2, "the second attempt goes on from the last finished window"
    kill(driver.pid)
    said = driver.communicate()[0]
    assert "killed  by SIGKILL" in said
    assert "again" in said
    wait_for_the_end_of(second["pid"])
    driver = launch(out, *GRID)
    kill(at_block(out, 5)["pid"])
    code, said = ended(driver)
    assert code == 0, said
    code, said = ended(launch(tmp_path / "undisturbed", *GRID, "sweep.own_process=false"))
    assert code == 0, said
    pd.testing.assert_frame_equal(frame(out), frame(tmp_path / "undisturbed"))


@pytest.fixture
def point(tmp_path: Path) -> Composed:
    """A point of a sweep."""
    return compose_run(overrides_for(tmp_path / "out"))


def _ending(monkeypatch: pytest.MonkeyPatch, *codes: int | BaseException) -> list[int]:
    """Let processes end like this, one after the other; returns how many were begun, counted as the sweep counts them."""
    left, counted = list(codes), []

    def run_apart(composed: Composed) -> int:
        counted.append(int(read_json(counter_of(composed))["attempts"]))
        code = left.pop(0)
        if isinstance(code, BaseException):
            raise code
        return code

    monkeypatch.setattr(attempts, "_run_apart", run_apart)
    return counted


@pytest.mark.parametrize("code", [-signal.SIGKILL, 128 + signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS])
def test_a_killed_job_is_tried_once_more(point: Composed, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Catches a job that is given up at its first death, and one that kills a machine again and again."""
    counted = _ending(monkeypatch, code, 0)
    assert attempt(point) is None
    assert counted == [1, 2]
    assert not counter_of(point).exists(), "its next sweep counts anew"
    counted = _ending(monkeypatch, code, code, 0)
    assert "killed 2 times" in str(attempt(point))
    assert len(counted) == MOST


def test_attempts_that_were_lost_with_their_machine_count(
    point: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a count that dies with the process that counts."""
    attempts.write_json(counter_of(point), {"attempts": MOST})
    counted = _ending(monkeypatch)
    assert "killed 2 times" in str(attempt(point))
    assert counted == []


def test_a_signal_that_another_thread_takes_is_answered(
    point: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a job that goes on to its end because the kernel gave its worker's second signal to another thread."""
    child, begun, told = (tmp_path / name for name in ("child", "begun", "told"))
    # It ends with its standard input, as a job does, or gives up.
    child.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, select\n"
        f"pathlib.Path({str(begun)!r}).touch()\n"
        "said = b'-'\n"
        "while said and select.select([0], [], [], 60)[0]:\n"
        "    said = os.read(0, 4096)\n"
        f"pathlib.Path({str(told)!r}).write_text('alone' if said else 'ended')\n",
        encoding="utf-8",
    )
    child.chmod(0o755)
    monkeypatch.setattr(attempts.sys, "executable", str(child))

    def answer(number: int, frame: FrameType | None) -> None:
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, answer)

    def send() -> None:
        wait_until(begun.exists, "the child")
        # Now it is waited for.
        time.sleep(0.5)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(SystemExit):
            attempt(point)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR2, before)
    assert told.read_text(encoding="utf-8") == "ended"


@pytest.mark.parametrize(
    ("code", "why"), [(3, "exit code 3"), (-signal.SIGTERM, "SIGTERM"), (-signal.SIGINT, "SIGINT")]
)
def test_what_was_not_killed_is_not_repeated(
    point: Composed, monkeypatch: pytest.MonkeyPatch, code: int, why: str
) -> None:
    """Catches a second attempt of what somebody asked to end, and of what would end the same again."""
    counted = _ending(monkeypatch, code)
    assert why in str(attempt(point))
    assert counted == [1]
    assert not counter_of(point).exists()


@pytest.mark.parametrize("told", [KeyboardInterrupt(), SystemExit(-1)])
def test_a_worker_that_is_told_to_end_counts_as_no_attempt(
    point: Composed, monkeypatch: pytest.MonkeyPatch, told: BaseException
) -> None:
    """Catches a queue's time limit taken for a death: after two of them the job would be given up."""
    _ending(monkeypatch, told)
    with pytest.raises(type(told)):
        attempt(point)
    assert not counter_of(point).exists()
