"""What runs of a sweep save by sharing: the study's grid of 12 runs with one cache, and each with a cache of its own.

Every point is run thrice, one after the other: with a cache that is empty but for downloads, so that dense evaluation,
generated text and converted weights are made for it alone; with the sweep's cache; and with the sweep's cache again, in
which by then everything lies, which is the floor. All three come to the same numbers, which is checked. Timed are whole
processes, imports included: seconds by the clock, which other work on the machine lengthens on all sides, and of the
processor. `--override` is of every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from timing import Measure, Rows

from reprune.cache import cache_root

PRUNERS = ("sparsegpt", "wanda", "magnitude")
TECHNIQUES = ("none", "br", "br_gp", "br_gp_cr")
SMALL = (
    "calibration.num_sequences=4", "calibration.length=128", "probes.held_out.num_sequences=2",
    "probes.wiki.num_sequences=2", "probes.code.num_sequences=2", "+calibration@probes.generated=generated",
    "probes.generated.num_sequences=4", "probes.generated.length=128", "probes.generated.max_new_tokens=128",
    "probes.generated.cross_documents=true", "evaluation.perplexity.num_windows=8", "reconstruction.epochs=1",
    "reconstruction.batch_size=2", "tracking=jsonl",
)  # fmt: skip
DOWNLOADS = ("wheels", "hub")
WAYS = {"alone": "alone", "shared": "shared", "all there": "shared"}
"""The cache of each way."""
POINTS = {f"{pruner} {technique}": (pruner, technique) for pruner, technique in product(PRUNERS, TECHNIQUES)}

SETTINGS = ("override",)
ONE_ROUND = True
CHILDREN = True


def arms(config: pytest.Config) -> list[str]:
    """Points of the grid."""
    return list(POINTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches and runs."""
    return tmp_path_factory.mktemp("sharing")


def test_point(
    arm: str, folder: Path, measure: Measure, rows: Rows, kept: Rows, request: pytest.FixtureRequest
) -> None:
    """One point, in three ways."""
    pruner, technique = POINTS[arm]
    point = [f"pruner={pruner}", f"reconstruction={technique}"]
    point += ["reconstruction.epochs=0"] if technique == "none" else []
    given = request.config.getoption
    overrides = [*SMALL, f"threads={given('threads')}", *given("override"), *point]
    numbers: list[dict[str, float]] = []

    def work() -> dict[str, Any]:
        row: dict[str, Any] = {"pruner": pruner, "technique": technique}
        for way, kind in WAYS.items():
            cache = folder / (f"alone {arm}" if kind == "alone" else kind)
            seconds, processor, found = run(cache, folder / way, overrides)
            name = way.replace(" ", "_")
            row |= {f"{name}_seconds": seconds, f"{name}_processor_seconds": processor}
            numbers.append(found)
        return row

    row = measure(work)
    assert numbers[0] == numbers[1] == numbers[2], "sharing changed a number"
    rows.append(row)
    kept.append(row)


def test_table(rows: Rows, printed: Rows) -> None:
    """Sums over the points."""
    for kind in ("seconds", "processor_seconds"):
        alone, shared, there = (
            sum(row[f"{way}_{kind}"] for row in rows) for way in ("alone", "shared", "all_there")
        )
        printed.append(
            {
                f"{len(rows)} runs": kind.replace("_", " "),
                "alone": alone,
                "shared": shared,
                "all there": there,
                "shared ÷ alone": shared / alone,
                "share": there / shared,
            }
        )


def run(cache: Path, output_dir: Path, overrides: list[str]) -> tuple[float, float, dict[str, float]]:
    """Do one run as a process; its seconds by the clock and of the processor, and its metrics."""
    cache.mkdir(exist_ok=True, parents=True)
    for kind in DOWNLOADS:
        if (cache_root() / kind).is_dir() and not (cache / kind).exists():
            (cache / kind).symlink_to(cache_root() / kind)
    before = set(output_dir.glob("*/result.json"))
    begun, used = time.perf_counter(), _of_children()
    subprocess.run(
        [sys.executable, "-m", "reprune.run", *overrides, f"output_dir={output_dir}"],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "REPRUNE_CACHE": str(cache)},
    )  # fmt: skip
    seconds, processor = time.perf_counter() - begun, _of_children() - used
    [made] = set(output_dir.glob("*/result.json")) - before
    metrics: dict[str, float] = json.loads(made.read_text(encoding="utf-8"))["metrics"]
    return seconds, processor, metrics


def _of_children() -> float:
    """Processor seconds of all processes that this one waited for."""
    told = os.times()
    return told.children_user + told.children_system
