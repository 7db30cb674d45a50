"""Runs that are kept as a file: reports read it as they read folders, and it names no place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

import reprune
from helpers import run_tiny
from reprune.reporting import cli
from reprune.reporting.frame import LATER, collect
from reprune.reporting.replicates import arm_names, chosen, summarise

CLAIM = """
- name: reconstruction lowers the error on its own text
  metric: reconstruction/calibration/vocabulary/last
  arm: {choice/reconstruction: br}
  against: {choice/reconstruction: none}
  measure: reduction
  side: above
"""


def _report(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["reprune-report", *map(str, arguments)])
    cli.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two techniques on two calibration sets."""
    folder = tmp_path_factory.mktemp("collected") / "runs"
    for technique in ("none", "br"):
        for number in (0, 1):
            run_tiny(folder, f"reconstruction={technique}", f"calibration.set={number}", "tracking=jsonl")
    return folder


@pytest.fixture(scope="module")
def kept(runs: Path) -> Path:
    """The same as a file."""
    file = runs.parent / "kept.csv"
    with pytest.MonkeyPatch.context() as patch:
        _report(patch, "collect", runs, "--csv", file)
    return file


def _metrics(frame: pd.DataFrame) -> list[str]:
    return [name for name in map(str, frame) if name.startswith(("reconstruction", "eval/"))]


@pytest.mark.filterwarnings("error")
def test_a_wide_file_is_read_without_a_word(runs: Path, kept: Path, tmp_path: Path) -> None:
    """Catches pandas' complaints between a person and a table."""
    wide = pd.read_csv(kept)
    more = pd.DataFrame({f"eval/pruned/x/{n}": [float(n)] * len(wide) for n in range(400)})
    pd.concat([wide, more], axis=1).to_csv(tmp_path / "wide.csv", index=False)
    assert len(reprune.results(tmp_path / "wide.csv", kept)) == 4
    assert len(reprune.results(runs, tmp_path / "wide.csv")) == 4


def test_numbers_and_arms_are_those_of_the_folders(runs: Path, kept: Path) -> None:
    """Catches digits that are lost, 'none' read as a missing value, labels made twice, and other arms."""
    first, second = (reprune.results(place).set_index("id").sort_index() for place in (runs, kept))
    metrics = _metrics(first)
    assert len(metrics) > 4
    pd.testing.assert_frame_equal(first[metrics], second[metrics], check_exact=True)
    for column in ("label", "choice/reconstruction", "config_hash", "config/calibration.set"):
        assert first[column].tolist() == second[column].tolist()
    assert arm_names(first).tolist() == arm_names(second).tolist()
    pd.testing.assert_frame_equal(
        summarise(first, metrics)[metrics], summarise(second, metrics)[metrics], check_dtype=False
    )


def test_no_place_is_named(runs: Path, kept: Path) -> None:
    """Catches a shared file that tells how somebody's machine is laid out."""
    text = kept.read_text(encoding="utf-8")
    assert str(runs) not in text
    assert str(runs.parent) not in text
    assert str(Path.home()) not in text


def test_a_row_says_its_command(kept: Path) -> None:
    """Catches a command without what makes the run this run, and one with where it went."""
    for row in reprune.results(kept).to_dict("records"):
        words: Sequence[str] = row["command"].split()
        assert words[0] == "reprune"
        assert f"reconstruction={row['choice/reconstruction']}" in words
        assert f"calibration.set={row['config/calibration.set']}" in words
        assert not any(word.startswith(("output_dir", "tracking")) for word in words)


def test_reports_are_made_of_it(
    runs: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches verdicts that change with the place they are read from, and plots that fail for want of folders."""
    claims = tmp_path / "claims.yaml"
    claims.write_text(CLAIM, encoding="utf-8")
    found = []
    for place in (runs, kept):
        out = tmp_path / place.stem
        _report(monkeypatch, place, "--out", out, "--claims", claims)
        found.append(pd.read_csv(out / "verdicts.csv"))
        assert (out / "report.html").is_file()
    pd.testing.assert_frame_equal(*found)
    drawn = [{path.name for path in (tmp_path / name).glob("*.png")} for name in ("runs", "kept")]
    assert "error_by_block.png" in drawn[0] - drawn[1], "what blocks say is not in the file"
    assert drawn[1] <= drawn[0]
    assert found[0]["sets"].tolist() == [2]


def test_a_file_and_a_folder_are_one_frame(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches arms that fall apart because a file does not tell None from NaN."""
    run_tiny(tmp_path / "more", "reconstruction=br", "calibration.set=2", "tracking=jsonl")
    frame = reprune.results(kept, tmp_path / "more")
    assert len(frame) == 5
    assert set(arm_names(frame)) == {"none", "br"}
    again = tmp_path / "again.csv"
    _report(monkeypatch, "collect", kept, tmp_path / "more", kept, "--csv", again)
    assert len(reprune.results(again)) == 5


def test_a_run_in_two_places_is_one_run(runs: Path, kept: Path, tmp_path: Path) -> None:
    """Catches a copy that counts twice, and a record that an attempt without an end wipes out."""
    shutil.copytree(runs, tmp_path / "copy")
    assert len(reprune.results(runs, tmp_path / "copy")) == 4
    for folder in (tmp_path / "copy").glob("*/"):
        (folder / "result.json").unlink()
    whole = reprune.results(kept)
    for places in ((kept, tmp_path / "copy"), (tmp_path / "copy", runs)):
        frame = reprune.results(*places).set_index("id").loc[whole["id"]].reset_index()
        assert set(frame["state"]) == {"finished"}
        metrics = _metrics(whole)
        pd.testing.assert_frame_equal(frame[metrics], whole[metrics], check_dtype=False)


def test_a_run_from_before_a_field_is_a_run_with_its_default(runs: Path, kept: Path, tmp_path: Path) -> None:
    """Catches runs of one arm that are taken for two because the older ones' records lack a field."""
    older = pd.read_csv(kept).drop(columns=[f"config/reconstruction.{field}" for field in LATER])
    older.loc[:1].to_csv(tmp_path / "older.csv", index=False)
    pd.read_csv(kept).loc[2:].to_csv(tmp_path / "newer.csv", index=False)
    frame = reprune.results(tmp_path / "older.csv", tmp_path / "newer.csv")
    for field, value in LATER.items():
        assert list(frame[f"config/reconstruction.{field}"]) == [value] * 4


def test_paths_are_hidden_and_told_apart(runs: Path, tmp_path: Path) -> None:
    """Catches places in configs and commands, and two masks that become one arm for want of their paths."""
    frame = reprune.results(runs)
    place = [str(tmp_path / name / "masks.safetensors") for name in ("a", "b", "a", "b")]
    frame["config/pruner.path"] = place
    frame["config/texts"] = [json.dumps([one, "web"]) for one in place]
    frame["command"] = [f"reprune pruner=mask 'pruner.path={one} and more' --x=/etc/y z=a/b" for one in place]
    collect(frame, tmp_path / "kept.csv")
    text = (tmp_path / "kept.csv").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "/etc" not in text
    assert "z=a/b" in text
    back = reprune.results(tmp_path / "kept.csv")
    assert back["config/pruner.path"].nunique() == back["config/texts"].nunique() == 2
    assert back["config/pruner.path"].str.startswith("masks.safetensors#").all()


def test_what_no_run_has_can_be_asked_for(runs: Path, tmp_path: Path) -> None:
    """Catches a claim on `null` that the folders answer and the file does not, and runs of before commands were kept."""
    frame = reprune.results(runs).assign(command=None)
    assert frame["config/sparsity"].isna().all()
    collect(frame, tmp_path / "kept.csv")
    back = reprune.results(tmp_path / "kept.csv")
    assert len(chosen(back, {"config/sparsity": None})) == 4
    collect(back, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "kept.csv").read_bytes()


def test_the_seed_that_counts_is_in_the_frame(tmp_path: Path) -> None:
    """Catches `seed_data=null`, which stands for `seed`, taken for a draw of its own."""
    run_tiny(tmp_path, "seed=3", "seed_training=5")
    [row] = reprune.results(tmp_path).to_dict("records")
    assert (row["config/seed_data"], row["config/seed_training"]) == (3, 5)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\0\1\2"])
def test_other_files_are_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a trace of pandas, and an empty report."""
    file = tmp_path / "other.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        _report(monkeypatch, file)
    assert ended.value.code == 2
    assert "collect" in capsys.readouterr().err
