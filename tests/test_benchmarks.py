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
    collected = _pytest("--collect-only", *(f"benchmarks/{name}.py" for name in NAMES))
    for name in NAMES:
        assert f"benchmarks/{name}.py" in collected


def test_rows_on_a_tiny_model(tmp_path: Path) -> None:
    """Catches an arm that fails, a table without the share reached, and a file without the machine or the settings."""
    names = ("cross_entropy", "gradients", "generation")
    path = tmp_path / "rows.csv"
    few = ("--model", "tiny", "--rounds", "1", "--windows", "2", "--length", "24", "--csv", str(path))
    shown = _pytest(*(f"benchmarks/bench_{name}.py" for name in names), *few)
    rows = pd.read_csv(path)
    assert set(rows["benchmark"]) == set(names)
    assert shown.count(" share ") == len(names)
    assert (rows["share"] > 0).all()
    assert set(rows["model"]) == {"tiny"}
    assert rows["machine"].str.contains("1 threads").all()


def test_growth_of_two_runs(tmp_path: Path) -> None:
    """Catches rows without guess or floor, and arms that are run though they are not asked for."""
    path = tmp_path / "rows.csv"
    sizes = [f"--arm=tokens {tokens} sparsegpt br_gp" for tokens in (256, 512)]
    shown = _pytest("benchmarks/bench_cost_growth.py", *sizes, "--csv", str(path))
    rows = pd.read_csv(path)
    assert list(rows["size"]) == [256, 512]
    assert (rows[["off", "share", "seconds/reconstruction", "guessed/reconstruction"]] > 0).all(axis=None)
    assert "growth exponent" in shown


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
    assert abs(found[module.CG]) < 1e-3
    assert 0 < found[module.SWEEP] < 1
