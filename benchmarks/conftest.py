"""What the timed benchmarks share: pytest-benchmark measures, arms take turns, a table is printed, a CSV file kept.

    .venv/bin/python -m pytest benchmarks/bench_speed.py --rounds 5 --csv FILE

A module names its arms (`arms(config)`) and the options that it heeds (`SETTINGS`); every round has all of them, one after the other, so that a ratio is of one
round, whatever else the machine does. The first round warms up, and is the one in which memory is measured. A module whose arms take minutes and stand alone has one
round (`ONE_ROUND`), of which `--arm` chooses; one that times processes of its own (`CHILDREN`) has the clock on the wall. `share` is of the floor reached: the seconds
of what cannot be spared, such as bare products in the same round, over those it took. pytest-benchmark's own options go on working (`--benchmark-timer=time.process_time`, `--benchmark-json=FILE`, `--benchmark-verbose`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from machine import machine
from pytest_benchmark.fixture import BenchmarkFixture
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import Measure, Rows, Seconds, clock_of, loaded
from transformers.utils import logging as transformers_logging

from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel

LINES = pytest.StashKey[list[Any]]()
WIDTH = 150
WALL = "time.perf_counter"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that every benchmark has; those of one alone are here too, where pytest looks for them."""
    group = parser.getgroup("reprune's benchmarks")
    group.addoption(
        "--rounds", type=int, help="rounds that count, 3 unless it is said; not where arms take minutes"
    )
    group.addoption(
        "--arm", action="append", help="this arm alone, where arms take minutes; may be given again"
    )
    group.addoption("--threads", type=int, default=1)
    group.addoption("--csv", type=Path, help="append the rows to this file")
    group.addoption("--model", default="smollm2_135m", help="an option of the group `model`")
    group.addoption("--device", default="cpu")
    group.addoption("--length", type=int, default=256, help="tokens a window")
    group.addoption("--windows", type=int, default=8)
    shapes = ["smollm2_135m", "llama_7b"]
    group.addoption("--shapes", choices=shapes, default=shapes[0], help="bench_speed: the block's")
    group.addoption("--no-training", action="store_true", help="bench_speed: without training steps")
    group.addoption("--runs", type=int, default=200, help="bench_report: how many runs it reads")
    group.addoption("--folder", type=Path, help="bench_memory: where checkpoint and runs go, 30 GB")
    group.addoption("--blocks", type=int, nargs="+", default=[0, 10, 20, 29], help="bench_least_squares")
    group.addoption("--first", type=int, help="bench_time_to_error: the first blocks alone")
    group.addoption("--windows-tried", type=int, nargs="+", default=[2, 9, 16, 23], help="bench_step_sizes")
    group.addoption("--set", type=int, default=0, help="bench_time_to_error: the calibration set")
    group.addoption("--override", action="append", default=[], metavar="KEY=VALUE", help="of every run")


def pytest_configure(config: pytest.Config) -> None:
    """Its table has a row for each arm and round; ours is shown instead."""
    config.option.benchmark_quiet = True
    config.stash[LINES] = []
    transformers_logging.disable_progress_bar()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each round and arm, round after round."""
    if "arm" not in metafunc.fixturenames:
        return
    config, module = metafunc.config, metafunc.module
    arms, asked, name = module.arms(config), config.getoption("arm"), module.__name__
    if _one_round(module) and config.getoption("rounds") is not None:
        raise pytest.UsageError(f"--rounds: {name} has one; begin it again for another")
    if asked is not None and not _one_round(module):
        raise pytest.UsageError(f"--arm: the arms of {name} are compared with one another")
    if asked is not None and not set(asked) <= set(arms):
        raise pytest.UsageError(f"--arm: {name} has {', '.join(arms)}")
    if getattr(module, "CHILDREN", False) and clock_of(config) != WALL:
        raise pytest.UsageError(f"--benchmark-timer: {name} times processes of its own, by {WALL} alone")
    numbers = [1] if _one_round(module) else range(_rounds(config, module) + 1)
    chosen = [arm for arm in arms if asked is None or arm in asked]
    metafunc.parametrize(("number", "arm"), [(number, arm) for number in numbers for arm in chosen])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What pytest-benchmark does not know of."""
    machine_info["reprune"] = _machine(config)


@pytest.fixture(scope="module", autouse=True)
def clock(request: pytest.FixtureRequest) -> Iterator[None]:
    """What reads the clock within an arm reads the benchmark's."""
    module, _, name = clock_of(request.config).rpartition(".")
    with patch("time.perf_counter", getattr(importlib.import_module(module), name)):
        yield


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """The model that was asked for."""
    return loaded(request.config)


@pytest.fixture(scope="module")
def seconds() -> Seconds:
    """What the rounds that count took, by arm."""
    return {}


@pytest.fixture(scope="module")
def rows() -> Rows:
    """What the arms came to, where each is a row or more."""
    return []


@pytest.fixture
def measure(benchmark: BenchmarkFixture, number: int, arm: str, seconds: Seconds) -> Measure:
    """Times one call; what it returns."""

    def once(work: Callable[[], Any]) -> Any:
        found = benchmark.pedantic(work, rounds=1, iterations=1)
        took = seconds.setdefault(arm, [])
        if number:
            took.append(benchmark.stats.stats.total)
        return found

    return once


@pytest.fixture
def told(kept: Rows, printed: Rows) -> Iterator[Rows]:
    """Rows that are printed and kept."""
    rows: Rows = []
    yield rows
    kept += rows
    printed += rows


@pytest.fixture
def printed(request: pytest.FixtureRequest) -> Iterator[Rows]:
    """Rows of a table behind the dots."""
    rows: Rows = []
    yield rows
    if not rows:
        return
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        # Headings are broken, cells never.
        heading = fill(column.replace("_", " "), 12)
        shown.add_column(heading, justify="left" if column == columns[0] else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    config = request.config
    config.stash[LINES] += [f"{_machine(config)}, {clock_of(config)}", shown]


@pytest.fixture
def kept(request: pytest.FixtureRequest) -> Iterator[Rows]:
    """Rows that are appended to the file of --csv, with the machine and the settings beside them."""
    rows: Rows = []
    yield rows
    config, module = request.config, request.module
    path: Path | None = config.getoption("csv")
    if path is None or not rows:
        return
    settings = {name: _setting(config.getoption(name)) for name in module.SETTINGS}
    settings |= {"rounds": _rounds(config, module), "clock": clock_of(config)}
    measured = [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    new = pd.DataFrame(measured).assign(
        benchmark=request.path.stem.removeprefix("bench_"), **settings, machine=_machine(config)
    )
    # As text: what was written stays as it is.
    old = [pd.read_csv(path, dtype=str)] if path.is_file() else []
    pd.concat([*old, new.astype("object")]).to_csv(path, index=False)


def _one_round(module: ModuleType) -> bool:
    return getattr(module, "ONE_ROUND", False)


def _rounds(config: pytest.Config, module: ModuleType) -> int:
    given: int | None = config.getoption("rounds")
    return 1 if _one_round(module) else 3 if given is None else given


def _setting(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _machine(config: pytest.Config) -> str:
    """What computes."""
    plan = plan_device(config.getoption("device"), "float32", None, config.getoption("threads"))
    return machine(plan.num_threads) if plan.kind == "cpu" else plan.name


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def pytest_terminal_summary(config: pytest.Config) -> None:
    """Print the tables behind the dots."""
    console = Console(width=WIDTH, highlight=False)
    console.print()
    for line in config.stash[LINES]:
        console.print(line)
