"""A job of a sweep in a process of its own: one that is killed takes nothing else with it, and is tried once more.

Whatever launches the sweep, its worker only waits here. The second attempt goes on from the last finished window.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from reprune.compose import Composed, prepare
from reprune.files import read_json, write_json
from reprune.tracking.progress import LOG, configure_logging, quiet_libraries

MOST = 2
"""Attempts that a sweep makes of a job that is killed."""
ENDED_BY_REQUEST = ("SIGINT", "SIGTERM")
SHELL_KILLED = 128 + signal.SIGKILL
LAST_WORDS_S = 10.0
"""How long an interrupted job may take to say where it stopped."""
QUEUE_SIGNALS = ("SIGUSR1", "SIGUSR2")
"""What a queue sends ahead of a time limit, to every process of the job: the one that waits here answers."""


def attempt(composed: Composed) -> str | None:
    """Do the job in a process of its own, again where that is killed; why it has no result, None where it may have one.

    An attempt is counted where the whole sweep sees it, so that one whose machine was lost with it counts too.
    """
    counter = counter_of(composed)
    counter.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(counter.with_suffix(".lock"))
    try:
        # Whoever asks whether it is held holds it for a moment.
        lock.acquire(timeout=1)
    except Timeout:
        # The same point twice in a grid, or in two sweeps at once: the other one does it.
        return None
    try:
        return _attempt(composed, counter)
    finally:
        lock.release()


def _attempt(composed: Composed, counter: Path) -> str | None:
    while True:
        begun = int(read_json(counter)["attempts"]) if counter.is_file() else 0
        if begun >= MOST:
            return f"killed {MOST} times; memory that ran out is the common reason"
        if begun:
            LOG.info("again   %s", " ".join(composed.overrides))
        write_json(counter, {"attempts": begun + 1})
        try:
            code = _run_apart(composed)
        except BaseException:
            # The worker was told to end, by a person or by a queue that will start it again: nobody was killed.
            counter.unlink(missing_ok=True)
            raise
        ended_by = _signal(code)
        if ended_by is None or ended_by in ENDED_BY_REQUEST:
            counter.unlink(missing_ok=True)
            return None if code == 0 else f"its process ended with {ended_by or f'exit code {code}'}"
        LOG.error("killed  by %s: %s", ended_by, " ".join(composed.overrides))


def counter_of(composed: Composed) -> Path:
    """Where the attempts are counted that were begun and have not ended by themselves."""
    return composed.sweep_folder / "attempts" / f"{composed.key}.json"


def _run_apart(composed: Composed) -> int:
    with subprocess.Popen(
        [sys.executable, "-m", "reprune.attempts"], stdin=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(asdict(composed)) + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            # It died before it read what to do, which its exit code says.
            return child.wait()
        try:
            # Without a limit it sleeps until the child ends or a signal wakes it; but a queue's two signals at once may
            # reach two threads, and only the first of them wakes this one. With a limit it looks around.
            return child.wait(threading.TIMEOUT_MAX)
        except KeyboardInterrupt:
            # At a terminal it got the same signal and says where it stopped; elsewhere it ends with the pipe.
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=LAST_WORDS_S)
            raise
        finally:
            child.stdin.close()


def _signal(code: int) -> str | None:
    """The signal that ended a process, told as Python does or as a shell does; None where it ended by itself."""
    if code == SHELL_KILLED:
        return signal.SIGKILL.name
    return signal.Signals(-code).name if code < 0 else None


def _end_with_the_worker() -> None:
    # Not sys.stdin, whose lock an exiting interpreter waits for.
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """The process apart: what to do comes on standard input, which stays open for as long as anybody wants it done."""
    from reprune.job import run_and_note

    # A queue that takes the machine back tells every process; the one that waits asks to be queued again.
    for name in (*QUEUE_SIGNALS, *(["SIGTERM"] if "SUBMITIT_EXECUTOR" in os.environ else [])):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    prepare()
    configure_logging()
    quiet_libraries()
    run_and_note(Composed(**{**given, "overrides": tuple(given["overrides"])}))


if __name__ == "__main__":
    main()
