"""Sweeps: failures that stop nothing, what is told before the first job, rules, caps, launchers."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import overrides_for, perplexity_on, write_documents
from reprune import job, pipeline, run
from reprune.compose import Composed, compose_run
from reprune.errors import ConfigError, RunError
from reprune.rules import check_rules, left_out
from reprune.run_folder import RunFolder
from reprune.run_plan import RunPlan

IN_PROCESS = ("sweep.own_process=false",)
GRID = ("-m", "pruner=wanda,magnitude,random")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command with a tiny run's overrides and these; its exit code."""
    # A handler that an earlier test made writes to an output that is closed by now.
    monkeypatch.setattr(logging.getLogger("reprune"), "handlers", [])

    def call(*more: str) -> int:
        flags = [argument for argument in more if argument.startswith("-")]
        rest = [argument for argument in more if argument not in flags]
        monkeypatch.setattr(
            sys, "argv", ["reprune", *flags, *overrides_for(tmp_path / "out", *IN_PROCESS, *rest)]
        )
        try:
            run.main()
        except SystemExit as ended:
            return int(str(ended.code))
        return 0

    return call


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """'PRUNER-SEED' of every run that loads its model, in order."""
    return _loading(monkeypatch, {})


def _loading(monkeypatch: pytest.MonkeyPatch, faults: dict[str, BaseException]) -> list[str]:
    """Let the runs named 'PRUNER-SEED' raise where they begin; returns the list of all that began."""
    names: list[str] = []
    real = pipeline._run

    def run_one(plan: RunPlan, *rest: Any) -> dict[str, Any]:
        name = f"{plan.composed.choices['pruner']}-{plan.config['seed']}"
        names.append(name)
        if name in faults:
            raise faults[name]
        return real(plan, *rest)

    monkeypatch.setattr(pipeline, "_run", run_one)
    return names


def test_a_failing_job_stops_no_other_and_is_all_that_runs_again(
    tmp_path: Path,
    main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a sweep that ends at its first failure, hides it, or does finished runs again."""
    faults: dict[str, BaseException] = {
        "wanda-0": RunError("block 2: the loss is not a number"),
        "magnitude-0": TypeError("a slip of ours"),
    }
    traced: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("reprune"), "exception", lambda *_: traced.append(sys.exc_info()[0]))
        assert len(_loading(patch, faults)) == 0
        assert main(*GRID) == 1
    told = capsys.readouterr()
    assert len(list((tmp_path / "out").glob("tiny-random-*/result.json"))) == 1
    table = told.out[told.out.index("2 of 3 runs are not finished") :]
    for line in ("block 2: the loss is not a number", "TypeError: a slip of ours"):
        assert line in table
    assert "pruner=wanda" in table
    assert "output_dir=" not in table, "what all runs share tells them not apart"
    assert traced == [TypeError], "a defect keeps its trace, what a person can mend needs none"
    states = {RunFolder(path.parent).facts()["state"] for path in (tmp_path / "out").glob("*/status.json")}
    assert states == {"finished", "failed"}
    names = _loading(monkeypatch, {})
    assert main(*GRID) == 0
    assert names == ["wanda-0", "magnitude-0"]
    assert "3 runs: 1 finished, 2 to do" in capsys.readouterr().out


def test_every_attempt_is_told_anew(main: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failed point that no later sweep tries again, and one that is tried twice by a grid that names it twice."""
    names = _loading(monkeypatch, {"wanda-0": RunError("no")})
    for _ in range(2):
        assert main("-m", "pruner=wanda", "seed=0,0") == 1
    assert names == ["wanda-0", "wanda-0"]


def test_a_finished_point_starts_no_process(
    main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a sweep that is repeated at the price of a process for each of its finished runs."""
    assert main("-m", "pruner=wanda,magnitude") == 0
    begun: list[Composed] = []
    monkeypatch.setattr(job, "attempt", begun.append)
    assert main(*GRID, "sweep.own_process=true") == 1
    assert [point.choices["pruner"] for point in begun] == ["random"]
    assert "3 runs: 2 finished, 1 to do" in capsys.readouterr().out


def test_points_that_only_evaluate_differently_share_a_run(
    tmp_path: Path, main: Callable[..., int], begun: list[str]
) -> None:
    """Catches a sweep that calls a run unfinished because its record shows the suite of another point."""
    text = tmp_path / "text.jsonl"
    write_documents(text)
    # perplexity_on chooses the evaluation, and then its text.
    sizes = [it for it in perplexity_on(mine=text) if "num_windows" not in it]
    windows = "evaluation.perplexity.num_windows=2,3"
    assert main("-m", *sizes, windows) == 0
    assert len(list((tmp_path / "out").glob("tiny-*"))) == 1
    del begun[:]
    assert main("-m", *sizes, windows) == 0
    assert begun == []


def test_an_interrupt_ends_the_sweep_at_once(
    main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches Ctrl-C taken for the failure of one job."""
    names = _loading(monkeypatch, {"magnitude-0": KeyboardInterrupt()})
    assert main(*GRID) == 130
    assert names == ["wanda-0", "magnitude-0"]
    assert "interrupted" in capsys.readouterr().err


def test_a_single_run_fails_as_ever(
    main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run whose failure is only noted, and a defect whose trace is swallowed, where there is no sweep."""
    _loading(monkeypatch, {"wanda-0": RunError("no room"), "magnitude-0": TypeError("a slip of ours")})
    assert main("pruner=wanda") == 1
    assert "failed: no room" in capsys.readouterr().err
    with pytest.raises(TypeError, match="a slip"):
        main("pruner=magnitude")


def test_what_another_process_is_at_is_left_to_it(
    tmp_path: Path,
    main: Callable[..., int],
    begun: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a twin that counts as a failure, is waited for without end, done twice, or told of again and again."""
    monkeypatch.setattr(job, "HELD_PATIENCE_S", 0.3)
    monkeypatch.setattr(job, "HELD_PAUSE_S", 0.1)
    assert main("pruner=wanda") == 0
    [folder] = (tmp_path / "out").glob("tiny-wanda-*")
    (folder / "result.json").unlink()
    with RunFolder(folder).locked():
        assert main("-m", "pruner=wanda,magnitude") == 1
    assert begun == ["wanda-0", "magnitude-0"]
    told = capsys.readouterr().out
    assert "1 of 2 runs are not finished" in told
    said = list({id(record): record.getMessage() for record in caplog.records}.values())
    assert [line for line in said if line.startswith("failed ")] == []
    assert len([line for line in said if line.startswith("left ")]) == 1
    assert "running" in told[told.index("1 of 2 runs") :]


def test_before_the_first_job(
    main: Callable[..., int], begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches duplicates run twice, skipped points that run, and an arithmetic that leaves one of them out."""
    rule = "sweep.skip=[{pruner: wanda, seed: 1}, {pruner: [random, none], seed: 0}, {pruner: sparsegpt}]"
    assert main("-m", "pruner=wanda,random", "seed=0,1,0", rule) == 0
    told = capsys.readouterr().out
    assert "2 runs: 0 finished, 2 to do; 1 duplicates, run once; 3 points skipped" in told
    assert "no point falls under: pruner: sparsegpt" in told
    assert "by arithmetic alone for 2 runs" in told
    assert "GiB a run" in told
    assert sorted(begun) == ["random-1", "wanda-0"]


def test_hours_come_from_finished_runs(
    tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an estimate that does not follow the seconds of finished runs of the same model, technique first."""
    assert main("pruner=wanda") == 0
    assert main("pruner=wanda", "reconstruction=none") == 0
    for path in (tmp_path / "out").glob("*/result.json"):
        result = json.loads(path.read_text())
        hours = 1 if result["choices"]["reconstruction"] == "none" else 10
        path.write_text(json.dumps({**result, "seconds": {"a": 1800 * hours, "b": 1800 * hours}}))
    capsys.readouterr()
    expected = {("reconstruction=none",): "about 2 h", ("reconstruction=br_gp",): "about 20 h", ("reconstruction=br",): "about 11 h", ("model.num_blocks=2",): "by arithmetic alone for 2 runs", ("model.num_blocks=2", "sweep.elsewhere=true"): "unknown for 2 runs"}  # fmt: skip
    for more, words in expected.items():
        assert main("-m", "pruner=magnitude", "seed=0,1", "sweep.max_runs=1", *more) == 2
        assert words in capsys.readouterr().err, more


def test_above_a_cap(
    tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str], begun: list[str]
) -> None:
    """Catches a slip in a grid that occupies a cluster for a week, and a cap that cannot be lifted or counts what is done."""
    assert main("pruner=sparsegpt") == 0
    [path] = (tmp_path / "out").glob("*/result.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": {"all": 3600}}))
    grid = ("-m", "pruner=sparsegpt,wanda,magnitude")
    caps = {
        "sweep.max_runs=1": "2 runs (sweep.max_runs=1)",
        "sweep.max_hours=1.5": "2 h (sweep.max_hours=1.5)",
    }
    for cap, words in caps.items():
        assert main(*grid, cap) == 2
        told = capsys.readouterr().err
        for word in (words, "3 runs: 1 finished, 2 to do", "GiB", "sweep.confirm=true"):
            assert word in told
    assert main(*grid, *caps, "dry_run=true") == 0
    assert begun == ["sparsegpt-0"]
    assert main(*grid, *caps, "sweep.confirm=true") == 0
    assert begun == ["sparsegpt-0", "wanda-0", "magnitude-0"]


@pytest.mark.parametrize(
    ("skip", "words"),
    [
        ("[{prunner: wanda}]", ("prunner", "did you mean 'pruner'")),
        ("[{reconstruction.epoch: 2}]", ("reconstruction.epoch", "no point has")),
        ("[{pruner: wand}]", ("sweep.skip (pruner)", "did you mean 'wanda'")),
        ("[{}]", ("empty rule",)),
        ("[{pruner: wanda}, {seed: [0, 1], pruner: [magnitude, random]}]", ("skip every point", "3")),
    ],
)
def test_rules_that_are_refused(
    tmp_path: Path,
    main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    skip: str,
    words: tuple[str, ...],
) -> None:
    """Catches a rule with a slip in it, which would silently skip nothing, and rules that leave nothing over."""
    assert main(*GRID, f"sweep.skip={skip}") == 2
    told = capsys.readouterr().err
    for word in ("sweep.skip", *words):
        assert word in told
    assert not (tmp_path / "out").exists()


def _point(*more: str) -> Composed:
    return compose_run(["model=tiny", *more])


def test_what_a_rule_names() -> None:
    """Catches a rule that matches by half of what it says, by a choice's keys instead of its name, or by no number."""
    rule = (
        "sweep.skip=[{pruner: sparsegpt, reconstruction.learning_rate: 1e-3, calibration@probes.wiki: wiki}]"
    )
    assert left_out(_point(rule, "reconstruction.learning_rate=0.001"))
    assert not left_out(_point(rule, "reconstruction.learning_rate=0.002"))
    assert not left_out(_point(rule, "reconstruction.learning_rate=0.001", "pruner=wanda"))
    assert not left_out(_point(rule, "reconstruction.learning_rate=0.001", "calibration@probes.wiki=stories"))
    some = "sweep.skip=[{pruner.damp: [0.01, 0.1]}]"
    points = [_point(some), _point(some, "pruner=wanda"), _point(some, "pruner.damp=0.05")]
    check_rules(points)
    assert [left_out(point) for point in points] == [True, False, False]
    with pytest.raises(ConfigError):
        check_rules(points[1:2])


def test_the_launch_is_no_part_of_a_run() -> None:
    """Catches a run that is another one, or is recorded as one, because it was launched differently."""
    plain = _point()
    other = _point("sweep.confirm=true", "sweep.max_hours=3", "sweep.skip=[{seed: 1}]")
    assert other.key == plain.key
    assert "sweep" not in other.config
    assert not any(group == "launcher" or group.startswith("hydra/") for group in plain.choices)
