"""The evidence: what the README says of it is what its files say, and a row's command is what was run."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

import reprune
from reprune.compose import compose_run
from reprune.reporting.replicates import IRRELEVANT

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for group in ("evidence", "methods")
    for path in sorted((ROOT / "experiments/results").glob(f"{group}_*.csv"))
    if "verdicts" not in path.name
]


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    """The script behind `make evidence`."""
    specification = importlib.util.spec_from_file_location("evidence", ROOT / "experiments/make.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("group", ["evidence", "methods"])
def test_readme_and_file_of_verdicts_are_what_the_runs_say(evidence: ModuleType, group: str) -> None:
    """Catches a table that was edited by hand, or left behind by new runs or claims."""
    table = evidence.verdicts(group).astype({"effect": float, "low": float, "high": float})
    kept = pd.read_csv(evidence.verdicts_file(group), keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(
        kept, table, check_dtype=False, check_index_type=False, check_column_type=False, rtol=1e-6
    )
    if group == "evidence":
        readme = evidence.README.read_text(encoding="utf-8")
        assert f"begin -->\n{evidence.as_markdown(table)}<!-- {evidence.PLACE}: end" in readme
    # A shown row has runs, and its last column names files that are there.
    shown = table[table["sets"] > 0]
    for names in shown["experiments"]:
        for name in names.split(", "):
            assert (ROOT / f"experiments/{name}.yaml").is_file()


def test_an_edge_in_the_numbers_is_shown_as_it_is(evidence: ModuleType) -> None:
    """Catches an interval that is dropped, a share that is shown as a number, and rows without runs."""
    row = {
        "claim": "(a)",
        "measure": "reduction",
        "effect": 0.538,
        "low": 0.5,
        "high": 0.571,
        "sets": 5,
        "threshold": "> 0.5",
        "verdict": "holds",
        "experiments": "evidence/main, evidence/longer",
    }
    ratio = row | {"claim": "(e)", "measure": "ratio", "threshold": "< 1", "verdict": "cannot say"}
    without = row | {"claim": "(z)", "sets": 0}
    lines = evidence.as_markdown(pd.DataFrame([ratio, row, without])).splitlines()
    assert len(lines) == 4
    assert "53.8 % (50.0 % to 57.1 %)" in lines[2]
    assert "> 50 %" in lines[2]
    assert "`evidence/main`, `evidence/longer`" in lines[2]
    assert "0.538 (0.500 to 0.571)" in lines[3]


def _kept(config: Mapping[str, Any], above: str = "config/") -> dict[str, str]:
    found = {}
    for key, value in config.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            found |= _kept(value, f"{name}.")
        elif value is not None and not name.startswith(IRRELEVANT):
            found[name] = value
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_rows_command_gives_its_config(file: Path) -> None:
    """Catches an experiment's file that was changed after its runs, so that their commands make other ones."""
    frame = reprune.results(file)
    assert frame["id"].is_unique
    for _, runs in frame.groupby("choice/experiments", dropna=False):
        for _, row in runs.iloc[[0, -1]].iterrows():
            composed = compose_run(shlex.split(row["command"])[1:])
            for key, value in _kept(composed.config).items():
                if key in ("config/seed_data", "config/seed_training"):
                    continue
                there = row[key]
                if isinstance(value, list):
                    value = str(value).replace("'", '"')
                assert there == value or float(there) == pytest.approx(value), (key, there, value)
