"""The benchmarks: all of them begin, those on a tiny model come to rows, and what one of them computes is right."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from reprune.engine.statistics import InputStatistics
from reprune.seeding import generator
from reprune.sparsity.patterns import Unstructured

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("bench_*.py"))


def _pytest(*given: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *given]
    # Of the processes of a suite that runs in several.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=FOLDER.parent, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    module = importlib.import_module(name)
    # Their names are everybody's.
    for theirs in [path.stem for path in FOLDER.glob("*.py") if path.stem not in before]:
        sys.modules.pop(theirs, None)
    return module


def test_every_benchmark_has_arms() -> None:
    """Catches one that the code has moved away from."""
    # The project's own -q leaves counts alone.
    told = ("-o", "addopts=", "--collect-only")
    collected = _pytest(*told, *(f"benchmarks/{name}.py" for name in NAMES))
    for name in NAMES:
        arms = [
            line
            for line in collected.splitlines()
            if line.startswith(f"benchmarks/{name}.py::test_") and "[1-" in line
        ]
        assert arms, name


def test_rows_on_a_tiny_model(tmp_path: Path) -> None:
    """Catches an arm that fails, a table without the share reached, and a file without the machine or the settings."""
    names = ("cross_entropy", "gradients")
    path = tmp_path / "rows.csv"
    few = ("--model", "tiny", "--rounds", "1", "--windows", "2", "--length", "24", "--csv", str(path))
    shown = _pytest(*(f"benchmarks/bench_{name}.py" for name in names), *few)
    rows = pd.read_csv(path)
    assert set(rows["benchmark"]) == set(names)
    assert shown.count(" share ") == len(names)
    assert "…" not in shown, "cells are cut"
    assert (rows["share"] > 0).all()
    assert set(rows["model"]) == {"tiny"}
    assert rows["machine"].str.contains("1 threads").all()


def test_growth_of_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches runs without guess or floor, and slopes over another size than that of the dimension."""
    module = _imported("bench_cost_growth", monkeypatch)
    small = {"hidden": 32, "blocks": 2, "window": 1}
    rows = [
        {"dimension": "tokens", "size": tokens, "pruner": "sparsegpt", "technique": "br_gp"}
        | module.measured("sparsegpt", "br_gp", {"tokens": tokens, **small}, 1)
        for tokens in (128, 256)
    ]
    for row in rows:
        assert all(row[name] > 0 for name in ("off", "share", "seconds/statistics", "guessed/statistics"))
        row["seconds"] = row["size"] ** 1.5
    growth = {row["growth exponent"]: row for row in module.exponents(rows)}
    assert growth["whole run"]["tokens"] == "1.50, 1.50"
    assert growth["whole run"]["hidden"] == ""
    [shares] = module.by_size(rows, "share", "share")
    assert len(shares["tokens"].split()) == 2


def test_recipes_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches recipes that do not begin alike or are not those that are named, and ends without a floor."""
    few = ["model=tiny", "calibration.num_sequences=2", "calibration.length=16", "threads=1"]
    module = _imported("bench_time_to_error", monkeypatch)
    rows = module.side_by_side("br_gp", 2, [*few, "probes.held_out.num_sequences=2"])
    by_recipe = {row["recipe"]: row for row in rows if row["block"] == 1}
    assert by_recipe["none"]["share"] is None
    assert by_recipe["none"]["seconds_of_all_blocks"] == 0
    assert 0 < by_recipe["study"]["calibration"] < by_recipe["none"]["calibration"]
    # Of so little work the seconds are noise.
    assert all(row["share"] for recipe, row in by_recipe.items() if recipe != "none")
    module = _imported("bench_step_sizes", monkeypatch)
    validation = ["+calibration@validation.web=web", "validation.web.num_sequences=2"]
    points = module.tried("br", [1], [*few, "~calibration@probes.held_out", *validation])
    begun = [point for point in points if point["steps"] == 0]
    assert len({point["calibration"] for point in begun if "CG" not in point["recipe"]}) == 1
    ends = {point["recipe"]: point for point in points if "floor_seconds" in point}
    assert set(ends) == {point["recipe"] for point in points}
    assert ends["study"]["steps"] == 5 * 2


def test_solvers_are_compared_with_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches statistics that are handed on in the wrong places, and an excess that is not one."""
    module = _imported("bench_least_squares", monkeypatch)
    stream = generator(0, "test")
    statistics = InputStatistics()
    statistics.add(torch.randn(200, 16, generator=stream), with_gram=True)
    weight = torch.randn(8, 16, generator=stream)
    rows = module.compare("layer", weight, statistics, Unstructured(), 0.5, 4)
    found = {row["solver"]: row["excess"] for row in rows}
    assert len(found) == 4
    assert all(row["share"] > 0 for row in rows)
    assert abs(found[module.CG]) < 1e-3
    assert 0 < found[module.SWEEP] < 1
