"""What the timed benchmarks share: pytest-benchmark measures, arms take turns, a table is printed, a CSV file kept.

    .venv/bin/python -m pytest benchmarks/bench_speed.py --rounds 5 --csv FILE

A module names its arms (`arms(config)`) and the options that it heeds (`SETTINGS`); every round has all of them, one after the other, so that a ratio is of one
round, whatever else the machine does. The first round warms up, and is the one in which memory is measured. pytest-benchmark's own options go on working
(`--benchmark-timer=time.process_time`, `--benchmark-json=FILE`, `--benchmark-verbose`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from machine import machine
from pytest_benchmark.fixture import BenchmarkFixture
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import Measure, Seconds, loaded
from transformers.utils import logging as transformers_logging

from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel

LINES = pytest.StashKey[list[Any]]()
WIDTH = 120


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that every benchmark has; those of one alone are here too, where pytest looks for them."""
    group = parser.getgroup("reprune's benchmarks")
    group.addoption("--rounds", type=int, default=3, help="rounds that count")
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


def pytest_configure(config: pytest.Config) -> None:
    """Its table has a row for each arm and round; ours is shown instead."""
    config.option.benchmark_quiet = True
    config.stash[LINES] = []
    transformers_logging.disable_progress_bar()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each round and arm, round after round."""
    if "arm" in metafunc.fixturenames:
        rounds = range(metafunc.config.getoption("rounds") + 1)
        arms = metafunc.module.arms(metafunc.config)
        metafunc.parametrize(("number", "arm"), [(number, arm) for number in rounds for arm in arms])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What pytest-benchmark does not know of."""
    machine_info["reprune"] = _machine(config)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """The model that was asked for."""
    return loaded(request.config)


@pytest.fixture(scope="module")
def seconds() -> Seconds:
    """What the rounds that count took, by arm."""
    return {}


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
def told(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows that are printed and, with --csv, appended to the file, with the machine and the settings beside them."""
    rows: list[dict[str, Any]] = []
    yield rows
    config = request.config
    lines = config.stash[LINES]
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        words = column.replace("_", " ")
        shown.add_column(words, justify="left" if column == columns[0] else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    clock = getattr(config.option.benchmark_timer, "__name__", config.option.benchmark_timer)
    lines += [f"{_machine(config)}, {clock}", shown]
    if config.getoption("csv") is not None:
        names = ("rounds", *request.module.SETTINGS)
        settings = {name: config.getoption(name) for name in names} | {"clock": str(clock)}
        measured = [
            {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        ]
        new = pd.DataFrame(measured).assign(
            benchmark=request.path.stem.removeprefix("bench_"), **settings, machine=_machine(config)
        )
        path: Path = config.getoption("csv")
        # As text: what was written stays as it is.
        old = [pd.read_csv(path, dtype=str)] if path.is_file() else []
        pd.concat([*old, new.astype("object")]).to_csv(path, index=False)


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
