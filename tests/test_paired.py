"""Two runs compared example by example."""

from __future__ import annotations

from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from reprune.errors import ConfigError
from reprune.evaluation.examples import write_examples
from reprune.files import write_json
from reprune.reporting import cli
from reprune.reporting.paired import paired, paired_texts


def evaluated(
    run: Path, right: dict[str, list[bool]], name: str = "a", order: list[int] | None = None, **identity: Any
) -> Path:
    """A run folder with one evaluation in which the examples of each task are right as given."""
    (run / "evaluations" / name).mkdir(parents=True)
    asked = {"harness": "1", "seeds": {"few": 1}, **identity.pop("common", {})}
    tasks = {task: {"config": {"text": task}, "documents": task, **identity} for task in right}
    write_json(
        run / "evaluations" / f"{name}.json",
        {"identity": {"evaluator": "zero_shot", **asked, "tasks": tasks}},
    )
    for task, answers in right.items():
        rows = pd.DataFrame(
            {
                "task": task,
                "doc_id": range(len(answers)),
                "doc_hash": [f"{task}{index}" for index in range(len(answers))],
                "filter": "none",
                "acc": np.array(answers, dtype=float),
            }
        )
        write_examples(run / "evaluations" / name, rows if order is None else rows.iloc[order])
    return run


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p by counting."""
    flips = lost + gained
    tail = sum(comb(flips, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**flips)


def test_pairs_are_counted_as_by_hand(tmp_path: Path) -> None:
    """Catches pairs joined by row, a difference with the wrong sign, and a test of all examples, not of those that flipped."""
    stream = np.random.default_rng(0)
    before = [bool(value) for value in stream.random(60) < 0.6]
    after = [bool(value) for value in stream.random(60) < 0.5]
    first = evaluated(tmp_path / "one", {"tiny": before, "only_here": [True]})
    # The second run has fewer examples, written in another order.
    second = evaluated(tmp_path / "two", {"tiny": after[:50]}, order=list(stream.permutation(50)))
    [row] = paired(first, second).to_dict("records")
    shared = list(zip(before[:50], after[:50], strict=True))
    lost, gained = shared.count((True, False)), shared.count((False, True))
    assert lost > 3 < gained
    assert lost != gained
    assert (row["task"], row["examples"], row["lost"], row["gained"]) == ("tiny", 50, lost, gained)
    assert row["acc_first"] == sum(before[:50]) / 50
    assert row["acc_second"] == sum(after[:50]) / 50
    assert row["difference"] == pytest.approx((gained - lost) / 50)
    assert row["p"] == pytest.approx(mcnemar(lost, gained), abs=1e-12)
    differences = np.array([int(late) - int(early) for early, late in shared])
    half = t.ppf(0.975, 49) * differences.std(ddof=1) / 50**0.5
    assert (row["low"], row["high"]) == pytest.approx((differences.mean() - half, differences.mean() + half))


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    """Catches a division by zero, and an interval of no width where nothing flipped."""
    runs = [evaluated(tmp_path / name, {"tiny": [True, False, True]}) for name in ("one", "two")]
    [row] = paired(*runs).to_dict("records")
    assert (row["difference"], row["lost"], row["gained"], row["p"]) == (0.0, 0, 0, 1.0)
    assert pd.isna(row["low"])
    assert pd.isna(row["high"])


def test_of_several_evaluations_the_pair_with_most_examples_counts(tmp_path: Path) -> None:
    """Catches a comparison over a first look at ten examples, where both runs have all."""
    first = evaluated(tmp_path / "one", {"tiny": [True] * 5}, name="a")
    evaluated(first, {"tiny": [True] * 20}, name="b")
    second = evaluated(tmp_path / "two", {"tiny": [False] * 20}, name="c")
    evaluated(second, {"tiny": [False] * 5}, name="d")
    [row] = paired(first, second).to_dict("records")
    assert (row["examples"], row["lost"]) == (20, 20)
    assert row["p"] == pytest.approx(2 / 2**20)


@pytest.mark.parametrize(
    ("differs", "told"),
    [
        ({"documents": "others"}, "documents"),
        ({"config": {"text": "tiny", "num_fewshot": 5}}, "config.num_fewshot"),
        ({"common": {"harness": "2"}}, "harness"),
    ],
)
def test_runs_that_were_asked_differently_are_no_pairs(
    tmp_path: Path, differs: dict[str, Any], told: str
) -> None:
    """Catches answers to other prompts that are paired because their tasks have one name."""
    first = evaluated(tmp_path / "one", {"tiny": [True, False]})
    second = evaluated(tmp_path / "two", {"tiny": [True, True]}, **differs)
    with pytest.raises(ConfigError, match="asked 'tiny' differently") as caught:
        paired(first, second)
    assert told in str(caught.value.value)


def test_runs_without_a_shared_example_are_told(tmp_path: Path) -> None:
    """Catches an empty table that reads as no difference."""
    first = evaluated(tmp_path / "one", {"tiny": [True, False]})
    with pytest.raises(ConfigError, match="share no example"):
        paired(first, evaluated(tmp_path / "two", {"other": [True]}))
    (tmp_path / "three").mkdir()
    with pytest.raises(ConfigError, match="no examples"):
        paired(first, tmp_path / "three")


def test_the_command_prints_and_writes_the_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a comparison that only Python can ask for, and runs named in the wrong order."""
    first = evaluated(tmp_path / "one", {"tiny": [True, True, False, True]})
    second = evaluated(tmp_path / "two", {"tiny": [True, False, False, False]})
    table = tmp_path / "new" / "pairs.csv"
    command = ["reprune-report", "paired", str(first), str(second), "--csv", str(table)]
    monkeypatch.setattr("sys.argv", command)
    cli.main()
    told = capsys.readouterr().out
    [row] = [line.replace("│", " ").split() for line in told.splitlines() if "tiny" in line]
    assert row[:6] == ["tiny", "none", "4", "0.75", "0.25", "-0.5"]
    assert row[-3:] == ["2", "0", "0.5"]
    assert pd.read_csv(table)["difference"].tolist() == [-0.5]
    monkeypatch.setattr("sys.argv", [*command[:3], str(tmp_path / "gone")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "no such folder" in capsys.readouterr().err


def _windows(run: Path, losses: list[float], tokens: list[int], documents: list[int] | None = None) -> Path:
    """A run folder with one evaluation of perplexity."""
    (run / "evaluations" / "a").mkdir(parents=True)
    write_json(run / "evaluations" / "a.json", {"identity": {"evaluator": "perplexity"}})
    frame = pd.DataFrame({"window": range(len(losses)), "tokens": tokens, "nll": losses})
    if documents is not None:
        frame["document"] = documents
    frame.to_parquet(run / "evaluations" / "a" / "windows_web.parquet")
    return run


@pytest.mark.parametrize("by_document", [False, True])
def test_losses_are_paired_by_window_or_document(tmp_path: Path, by_document: bool) -> None:
    """Catches a mean of windows' means where tokens count, windows of one document as independent, and a wrong sign."""
    stream = np.random.default_rng(1)
    tokens = [10, 20, 30, 10, 20, 30]
    first, second = (stream.uniform(20, 60, 6).tolist() for _ in range(2))
    documents = [0, 0, 1, 1, 2, 2] if by_document else None
    runs = [
        _windows(tmp_path / name, it, tokens, documents) for name, it in (("one", first), ("two", second))
    ]
    [row] = paired_texts(*runs).to_dict("records")
    assert row["ppl_first"] == pytest.approx(np.exp(sum(first) / 120))
    assert row["ppl_second"] == pytest.approx(np.exp(sum(second) / 120))
    assert row["difference"] == pytest.approx((sum(second) - sum(first)) / 120)
    gaps = np.array(second) - np.array(first)
    units = gaps.reshape(3, 2).sum(axis=1) if by_document else gaps
    scaled = units * len(units) / 120
    half = t.ppf(0.975, len(units) - 1) * scaled.std(ddof=1) / len(units) ** 0.5
    assert row["windows"] == len(units)
    assert (row["low"], row["high"]) == pytest.approx((scaled.mean() - half, scaled.mean() + half))


def test_a_folder_that_is_no_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an empty folder that reads as a run without shared examples."""
    first = evaluated(tmp_path / "one", {"tiny": [True]})
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["reprune-report", "paired", str(first), str(tmp_path / "empty")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "this is no run that was evaluated" in capsys.readouterr().err
