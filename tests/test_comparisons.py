"""Runs held against each other on the command line: what differs, and what they say of claims."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from helpers import run_tiny
from reprune.errors import ConfigError
from reprune.reporting import cli
from reprune.reporting.comparisons import claims_in, differences


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two techniques on three calibration sets."""
    folder = tmp_path_factory.mktemp("runs")
    for technique in ("none", "least_squares"):
        for number in range(3):
            run_tiny(
                folder, f"reconstruction={technique}", f"calibration.set={number}", "probes.held_out=null"
            )
    return folder


CLAIM = """
- name: least squares lowers the error by a tenth
  metric: reconstruction/calibration/vocabulary/last
  arm: {choice/reconstruction: least_squares}
  against: {choice/reconstruction: none}
  measure: reduction
  side: above
  threshold: 0.1
"""


def test_verdicts_of_real_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a claim that the runs' own columns cannot answer."""
    (tmp_path / "claims.yaml").write_text(CLAIM)
    table = tmp_path / "verdicts.csv"
    command = ["reprune-report", "verdicts", str(runs), "--claims", str(tmp_path / "claims.yaml")]
    monkeypatch.setattr(sys, "argv", [*command, "--csv", str(table)])
    cli.main()
    assert "least squares lowers the error by a tenth" in capsys.readouterr().out
    [row] = pd.read_csv(table).to_dict("records")
    assert (row["sets"], row["threshold"]) == (3, "> 0.1")
    assert row["low"] < row["effect"] < row["high"]
    expected = "holds" if row["low"] > 0.1 else "does not hold" if row["high"] < 0.1 else "cannot say"
    assert row["verdict"] == expected


def test_difference_of_two_runs(runs: Path) -> None:
    """Catches a difference that hides the choice that makes it, or drowns it in folders and seconds."""
    names = {folder.name: folder for folder in runs.iterdir() if (folder / "result.json").is_file()}
    frames = {name: pd.read_json(folder / "result.json", typ="series") for name, folder in names.items()}
    chosen = [
        next(names[name] for name, it in frames.items() if it["choices"]["reconstruction"] == technique)
        for technique in ("none", "least_squares")
    ]
    found = differences(*chosen).set_index("what")
    assert tuple(found.loc["choice/reconstruction"]) == ("none", "least_squares")
    assert "reconstruction/calibration/vocabulary/last" in found.index
    assert not [name for name in found.index if "seconds" in name or "output_dir" in name]
    assert differences(chosen[0], chosen[0]).empty
    with pytest.raises(ConfigError, match="holds 6 runs"):
        differences(runs, chosen[0])


def test_summary_is_written_in_three_formats(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a table that cannot be pasted into a paper, or in which sets count as arms."""
    monkeypatch.setattr(sys, "argv", ["reprune-report", str(runs), "--out", str(tmp_path)])
    cli.main()
    table = pd.read_csv(tmp_path / "summary.csv")
    assert table["sets"].tolist() == [3, 3]
    metric = "reconstruction/calibration/vocabulary/last"
    whole = pd.read_parquet(tmp_path / "runs.parquet")
    for _, row in table.iterrows():
        own = whole[
            whole["config/reconstruction.layerwise._target_"].isna()
            == pd.isna(row.get("config/reconstruction.layerwise._target_"))
        ]
        assert row[metric] == pytest.approx(own[metric].mean())
        assert row[f"{metric} std"] == pytest.approx(own[metric].std())
    assert (tmp_path / "summary.md").read_text().count("|\n") >= 3
    assert "\\begin{tabular}" in (tmp_path / "summary.tex").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("just: text", "is not a list of claims"),
        ("- [", "cannot be read"),
        ("- {nam: it}", "did you mean 'name'"),
        (CLAIM.replace("reduction", "reducton"), "did you mean 'reduction'"),
    ],
)
def test_claims_that_cannot_be_read_are_told(tmp_path: Path, content: str, words: str) -> None:
    """Catches a slip in the file of claims that is passed over."""
    (tmp_path / "claims.yaml").write_text(content)
    with pytest.raises(ConfigError, match=words):
        claims_in(tmp_path / "claims.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        claims_in(tmp_path / "gone.yaml")


def test_report_names_wandb_files_only_where_there_are_some(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an invitation to send files that are not there."""
    monkeypatch.setattr(sys, "argv", ["reprune-report", str(runs), "--out", str(tmp_path)])
    cli.main()
    assert "wandb sync" not in capsys.readouterr().out
