"""Reports: what a person reads is what the run folders hold."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from helpers import plan_of
from reprune.config_files import config_root
from reprune.help import options
from reprune.pipeline import run
from reprune.reporting import cli
from reprune.reporting.frame import blocks, results


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without and one with reconstruction."""
    folder = tmp_path_factory.mktemp("runs")
    for technique in ("none", "br_gp"):
        run(
            plan_of(
                folder,
                f"reconstruction={technique}",
                "reconstruction.epochs=0" if technique == "none" else "seed=0",
            )
        )
    return folder


def test_frame_holds_the_results(two_runs: Path) -> None:
    """A row a run, each metric under its own name, equal to the record."""
    frame = results(two_runs)
    assert set(frame["choice/reconstruction"]) == {"none", "br_gp"}
    assert (frame["state"] == "finished").all()
    rows = blocks(frame)
    for _, one in frame.iterrows():
        last = rows[(rows["id"] == one["id"]) & (rows["moment"] == "after") & (rows["role"] == "calibration")]
        last = last[last["block"] == last["block"].max()]
        assert last["error"].item() == one["reconstruction/calibration/vocabulary/last"]


def test_report_writes_table_and_plot(
    two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed table names both arms in the order they ran; the files are there and say the same."""
    out = tmp_path / "report"
    monkeypatch.setattr(sys, "argv", ["reprune-report", str(two_runs), "--out", str(out)])
    cli.main()
    printed = capsys.readouterr().out
    assert re.search(r"none.*\n.*br_gp", printed)
    table = pd.read_csv(out / "arms.csv")
    assert list(table["arm"])[-2:] == ["none", "br_gp"]
    assert (out / "error_by_block.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", ["absent", "."])
def test_nothing_to_report(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not there, or holds no runs, is said so with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["reprune-report", str(tmp_path / place)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


def test_readme_and_help_name_every_option() -> None:
    """An option that exists but is not in the README's table is one nobody finds."""
    readme = (config_root() / "README.md").read_text(encoding="utf-8")
    for group in sorted(path.name for path in (config_root() / "conf").iterdir() if path.is_dir()):
        for name, line in options(group).items():
            assert f"`{name}`" in readme or f"`{name} " in readme, f"{group}={name} is not in the README"
            assert line, f"conf/{group}/{name}.yaml has no first line that says what it is"


@pytest.mark.parametrize(
    "notebook", sorted((config_root() / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebooks_run_and_are_stored_without_outputs(
    notebook: Path, two_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook that no longer runs, or that carries yesterday's figures."""
    monkeypatch.setenv("REPRUNE_RUNS", str(two_runs))
    names: dict[str, object] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
    assert names
