"""How far runs are, and the room that finished ones give back."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from helpers import overrides_for, plan_of, run_tiny, state_bytes
from reprune.check import check
from reprune.compose import compose_run
from reprune.errors import RunError
from reprune.files import write_json
from reprune.pipeline import run
from reprune.reporting import cli
from reprune.reporting.status import counts, duration, free, freeable_bytes, show_status, status_rows
from reprune.run_folder import RunFolder


class Stop(BaseException):
    """What ends a run like a kill: nothing marks the folder."""


def stop_after(count: int) -> Callable[[int], None]:
    """What ends a run when so many windows are finished; a run that goes on tells of those it has, too."""

    def after_commit(windows: int) -> None:
        if windows == count:
            raise Stop

    return after_commit


def report(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`reprune-report` with arguments."""
    monkeypatch.setattr("sys.argv", ["reprune-report", *map(str, arguments)])
    cli.main()


def test_every_state_as_a_real_run_leaves_it(tmp_path: Path) -> None:
    """Catches a killed run shown as running, a failed one without its reason, and blocks counted wrong."""
    run_tiny(tmp_path, "seed=0")
    seen = []

    def stop(error: BaseException) -> None:
        def after_commit(windows: int) -> None:
            if windows == 2:
                seen.append({row["state"]: row for row in status_rows([tmp_path])}["running"])
                raise error

        seed = {"Stop": 1, "RunError": 2, "KeyboardInterrupt": 3}[type(error).__name__]
        with pytest.raises(type(error)):
            run(plan_of(tmp_path, f"seed={seed}"), after_commit)

    for error in (Stop(), RunError("no more room"), KeyboardInterrupt()):
        stop(error)
    waiting = tmp_path / "tiny-wanda-none-0123456789ab"
    waiting.mkdir()
    (waiting / ".lock").touch()
    os.utime(waiting / ".lock", (0, 0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").touch()
    rows = {row["state"]: row for row in status_rows([tmp_path])}
    assert set(rows) == {"done", "killed", "failed", "interrupted", "not begun"}
    assert (rows["done"]["block"], rows["done"]["num_blocks"]) == (3, 3)
    for state in ("killed", "failed", "interrupted"):
        assert (rows[state]["block"], rows[state]["num_blocks"], rows[state]["seconds_left"]) == (2, 3, None)
    assert rows["failed"]["error"] == "no more room"
    for row in seen:
        assert (row["block"], row["num_blocks"]) == (2, 3)
        assert 0 < row["seconds_left"] < 60
        assert time.time() - 120 < row["since_s"] < time.time()
    assert counts(list(rows.values())).count("1 ") == 5
    with FileLock(waiting / ".lock"):
        assert [row["state"] for row in status_rows([waiting])] == ["starting"]


def test_failures_before_there_is_a_folder_are_shown(tmp_path: Path) -> None:
    """Catches a point that a machine refused, which vanishes when its sweep ends, and one that is shown twice."""
    sweep = tmp_path / "out" / ".multirun"
    for key in ("a" * 64, "b" * 64):
        write_json(sweep / "failed" / f"{key}.json", {"error": "no such file"})
    plan, _ = run_tiny(tmp_path / "out")
    write_json(sweep / "runs" / f"{'b' * 64}.json", {"run": plan.folder.id, "alike": "x"})
    rows = {row["id"]: row for row in status_rows([tmp_path])}
    assert {name: row["state"] for name, row in rows.items()} == {
        plan.folder.id: "done",
        f"point {'a' * 12}": "failed",
    }
    assert rows[f"point {'a' * 12}"]["error"] == "no such file"


def test_watching_ends_where_nothing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a watch that waits for ever on a folder that nobody holds."""
    waiting = tmp_path / "tiny-wanda-none-0123456789ab"
    waiting.mkdir()
    (waiting / ".lock").touch()
    os.utime(waiting / ".lock", (0, 0))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it goes on"))
    show_status([str(tmp_path), "--watch"])
    assert "1 not begun" in capsys.readouterr().out


def test_time_left_is_at_the_pace_of_this_attempt(tmp_path: Path) -> None:
    """Catches a pace that counts blocks of an earlier attempt, loading, or forgets the time since the last block."""
    folder = RunFolder(tmp_path / "tiny-wanda-none-0123456789ab")
    folder.path.mkdir()
    facts = {"state": "running", "unix_time_s": 1060.0, "begun_s": 900.0, "blocks_begun_s": 1000.0,
             "block": 14, "first_block": 10, "num_blocks": 30}  # fmt: skip
    with FileLock(folder.path / ".lock"):
        (folder.path / "status.json").write_text(json.dumps(facts))
        [row] = status_rows([tmp_path], now_s=1065.0)
        # 4 blocks in 60 s, 16 left, 5 s of them gone.
        assert row["seconds_left"] == pytest.approx(16 * 15 - 5)
        assert row["since_s"] == 900.0
        (folder.path / "status.json").write_text(json.dumps({**facts, "block": 10}))
        [row] = status_rows([tmp_path], now_s=1065.0)
        assert row["seconds_left"] is None
    assert [duration(x) for x in (None, 7.4, 240, 7300, 200000)] == ["–", "7 s", "4 min", "2 h", "2 d"]


def test_marks_keep_the_beginning_of_the_attempt(tmp_path: Path) -> None:
    """Catches a second attempt that goes on with the first one's clock, and folders of earlier versions that fail."""
    with pytest.raises(Stop):
        run(plan_of(tmp_path), stop_after(1))
    [folder] = tmp_path.iterdir()
    first = RunFolder(folder).facts()
    assert (first["block"], first["first_block"]) == (1, 0)
    assert first["begun_s"] <= first["blocks_begun_s"] <= first["unix_time_s"]
    with pytest.raises(Stop):
        run(plan_of(tmp_path), stop_after(2))
    second = RunFolder(folder).facts()
    assert (second["block"], second["first_block"]) == (2, 1)
    assert second["begun_s"] > first["unix_time_s"]
    (folder / "status.json").write_text(json.dumps({"state": "failed", "error": "old"}))
    [row] = status_rows([tmp_path])
    assert (row["state"], row["block"], row["num_blocks"]) == ("failed", None, None)


def test_watch_ends_when_all_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a watch that ends too early or never, and one whose looking makes the run fail."""
    plan = plan_of(tmp_path)
    plan.folder.path.mkdir()
    (plan.folder.path / ".lock").touch()
    watcher = threading.Thread(
        target=report, args=(monkeypatch, "status", tmp_path, "--watch", "--every", "0.001")
    )
    watcher.start()
    time.sleep(0.3)
    assert watcher.is_alive()
    run(plan)
    watcher.join(timeout=30)
    assert not watcher.is_alive()
    assert capsys.readouterr().out.rstrip().endswith("1 done")


def test_status_prints_a_row_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that is not wired up, and an empty folder passed over in silence."""
    plan, _ = run_tiny(tmp_path / "runs")
    report(monkeypatch, "status", tmp_path / "runs")
    printed = capsys.readouterr().out
    assert re.search(rf"{plan.folder.id}.*done.*3 of 3", printed)
    assert printed.rstrip().endswith("1 done")
    (tmp_path / "empty").mkdir()
    for command in ("status", "clean"):
        with pytest.raises(SystemExit) as ended:
            report(monkeypatch, command, tmp_path / "empty")
        assert ended.value.code == 2


def test_clean_frees_finished_runs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches state of an unfinished run that is gone, a question that is not asked, results that go with the state."""
    done, _ = run_tiny(tmp_path, "seed=0")
    with pytest.raises(Stop):
        run(plan_of(tmp_path, "seed=1"), stop_after(1))
    [unfinished] = [path for path in tmp_path.iterdir() if path != done.folder.path]
    (unfinished / "activations").mkdir(exist_ok=True)
    before = state_bytes(unfinished)
    size = sum(path.stat().st_size for path in done.folder.state.iterdir())
    assert freeable_bytes(done.folder) == size > 0
    assert freeable_bytes(RunFolder(unfinished)) == free(RunFolder(unfinished)) == 0
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    report(monkeypatch, "clean", tmp_path)
    assert done.folder.state.is_dir()
    assert "of 1 finished runs" in (told := capsys.readouterr().out)
    assert "need the exported model/, which 1 of them do not have" in told
    with FileLock(done.folder.path / ".lock"):
        report(monkeypatch, "clean", tmp_path, "--yes")
    assert done.folder.state.is_dir()
    kept = {path.name for path in done.folder.path.iterdir()} - {"state"}
    report(monkeypatch, "clean", tmp_path, "--yes")
    assert {path.name for path in done.folder.path.iterdir()} == kept
    assert state_bytes(unfinished) == before
    assert (unfinished / "activations").is_dir()
    # The unfinished run goes on as if nothing had been.
    assert run(plan_of(tmp_path, "seed=1"))["status"] == "finished"
    capsys.readouterr()
    shutil.rmtree(unfinished)
    report(monkeypatch, "clean", tmp_path)
    assert "nothing to free" in capsys.readouterr().out
    assert run(check(compose_run(overrides_for(tmp_path, "seed=0"))))["id"] == done.folder.id
