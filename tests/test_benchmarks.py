"""The benchmarks that are scripts: they begin, and what one of them computes is right."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from reprune.engine.statistics import InputStatistics
from reprune.seeding import generator
from reprune.sparsity.patterns import Unstructured

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(
    path.stem for path in FOLDER.glob("*.py") if "def main()" in path.read_text(encoding="utf-8")
)


def _imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    module = importlib.import_module(name)
    # Their names are everybody's.
    for theirs in [path.stem for path in FOLDER.glob("*.py") if path.stem not in before]:
        sys.modules.pop(theirs, None)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a script that the code has moved away from, and one whose figures cannot be kept."""
    script = _imported(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert "--csv" in capsys.readouterr().out


def test_solvers_are_compared_with_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches statistics that are handed on in the wrong places, and an excess that is not one."""
    script = _imported("least_squares", monkeypatch)
    stream = generator(0, "test")
    statistics = InputStatistics()
    statistics.add(torch.randn(200, 16, generator=stream), with_gram=True)
    weight = torch.randn(8, 16, generator=stream)
    found = script.compare("layer", weight, statistics, Unstructured(), 0.5, 4)
    assert list(found) == list(script.ARMS)
    assert abs(found["CG, tol"][0]) < 1e-3
    assert 0 < found["SparseGPT"][0] < 1
