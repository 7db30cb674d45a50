"""How seconds grow with tokens, hidden size, blocks and window: by stage, beside what `dry_run` guesses.

Whole runs of a random model on random tokens through the real pipeline, one process: Wanda and SparseGPT ×
none, br_gp and br_gp_cr. One dimension at a time leaves the middle (`BASE`). Printed are growth exponents, slopes of log
seconds over log size fitted to the sizes of a dimension: of all of them, and of the largest two alone, since small sizes are
all overhead; the median over the arms that have the stage. Then how many times the guess a run took, and the share of its
floor (`floors.floors_of`) that the work on blocks reached, from the smallest to the largest size. Every run is a row of the CSV. With --benchmark-timer=time.process_time all clocks are of
processor time, which other work on the machine disturbs least, and which on one thread is what an idle machine takes but
for waiting for a disk.
"""

from __future__ import annotations

from itertools import product
from math import log
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from floors import floors_of
from timing import Measure, Rows

from reprune.arithmetic import guessed_stages
from reprune.check import check
from reprune.compose import compose_run
from reprune.pipeline import run

BASE = {"tokens": 512, "hidden": 256, "blocks": 3, "window": 1}
SIZES = {
    "tokens": (256, 512, 1024, 2048),
    "hidden": (128, 256, 512, 768),
    "blocks": (2, 3, 6),
    "window": (1, 2, 3),
}
LENGTH = 128
PRUNERS = ("wanda", "sparsegpt")
TECHNIQUES = ("none", "br_gp", "br_gp_cr")
LEAST = 0.002
"""Seconds at the smallest size below which a stage is left out of the table."""


SETTINGS = ()
ONE_ROUND = True


POINTS = {
    f"{dimension} {size} {pruner} {technique}": (dimension, size, pruner, technique)
    for dimension, sizes in SIZES.items()
    for size, pruner, technique in product(sizes, PRUNERS, TECHNIQUES)
    # A window of another size is br_gp's; CR's is two.
    if dimension != "window" or technique == "br_gp"
}


def arms(config: pytest.Config) -> list[str]:
    """Sizes of a dimension × pruners × techniques."""
    return list(POINTS)


@pytest.fixture(scope="module")
def begun(request: pytest.FixtureRequest) -> None:
    """A run has loaded what all others find loaded."""
    measured(PRUNERS[0], TECHNIQUES[0], BASE, request.config.getoption("threads"))


@pytest.mark.usefixtures("begun")
def test_run(arm: str, measure: Measure, rows: Rows, kept: Rows, request: pytest.FixtureRequest) -> None:
    """One run."""
    dimension, size, pruner, technique = POINTS[arm]
    row = {"dimension": dimension, "size": size, "pruner": pruner, "technique": technique}
    sizes, threads = {**BASE, dimension: size}, request.config.getoption("threads")
    rows.append({**row, **measure(lambda: measured(pruner, technique, sizes, threads))})
    kept.append(rows[-1])


def test_exponents(rows: Rows, printed: Rows) -> None:
    """Growth by stage."""
    printed += exponents(rows)


def test_guesses(rows: Rows, printed: Rows) -> None:
    """By how much the guess is off."""
    printed += by_size(rows, "times the guess", "off")


def test_shares(rows: Rows, printed: Rows) -> None:
    """What share of its floor a run reaches."""
    printed += by_size(rows, "share", "share")


def measured(pruner: str, technique: str, sizes: dict[str, int], threads: int) -> dict[str, float]:
    """Seconds and guessed seconds of one run, in all and by stage, and the share of its floor that its work on blocks reached."""
    sequences = sizes["tokens"] // LENGTH
    # CR is window 2, stride 1.
    window = [f"reconstruction.window={sizes['window']}", "reconstruction.stride=1"]
    with TemporaryDirectory() as place:
        plan = check(
            compose_run(
                [
                    "model=tiny",
                    f"model.num_blocks={sizes['blocks']}",
                    f"model.hidden_size={sizes['hidden']}",
                    "calibration=vocabulary",
                    f"calibration.num_sequences={sequences}",
                    f"calibration.length={LENGTH}",
                    "probes.held_out.num_sequences=2",
                    "~calibration@probes.wiki",
                    "~calibration@probes.code",
                    f"pruner={pruner}",
                    f"reconstruction={technique}",
                    "reconstruction.epochs=2",
                    "reconstruction.batch_size=1",
                    *(window if technique == "br_gp" else []),
                    "evaluation=none",
                    "tracking=jsonl",
                    f"threads={threads}",
                    "device=cpu",
                    f"output_dir={place}",
                ]
            )
        )
        stages, guesses, floors = dict(run(plan)["seconds"]), guessed_stages(plan), floors_of(plan)
    took, guess = sum(stages.values()), sum(guesses.values())
    return {
        "seconds": took,
        "guessed_seconds": guess,
        "off": took / guess,
        "share": sum(floors.values()) / sum(stages.get(stage, 0) for stage in floors),
        **{f"seconds/{stage}": value for stage, value in stages.items()},
        **{f"guessed/{stage}": value for stage, value in guesses.items()},
    }


def exponents(rows: Rows) -> Rows:
    """A row a stage: its growth in every dimension, of all sizes and of the largest two."""
    shown = []
    stages = dict.fromkeys(name for row in rows for name in row if name.startswith("seconds/"))
    for column in [*stages, "seconds"]:
        cells = {dimension: _growth(rows, column, dimension) for dimension in SIZES}
        if any(cells.values()):
            stage = "whole run" if column == "seconds" else column.removeprefix("seconds/")
            shown.append({"growth exponent": stage, **cells})
    return shown


def _growth(rows: Rows, column: str, dimension: str) -> str:
    slopes, ends = [], []
    for points in _by_arm(rows, dimension).values():
        seconds = [row.get(column, 0) for row in points]
        if len(points) > 1 and min(seconds) >= LEAST:
            x, y = [log(row["size"]) for row in points], [log(value) for value in seconds]
            slopes.append(float(np.polyfit(x, y, 1)[0]))
            ends.append((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return f"{median(slopes):.2f}, {median(ends):.2f}" if slopes else ""


def by_size(rows: Rows, title: str, column: str) -> Rows:
    """A row an arm: `column`, from the smallest to the largest size of each dimension."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for dimension in SIZES:
        for arm, points in _by_arm(rows, dimension).items():
            cells.setdefault(arm, {})[dimension] = " ".join(f"{row[column]:.2g}" for row in points)
    return [{title: f"{pruner} {technique}", **own} for (pruner, technique), own in cells.items()]


def _by_arm(rows: Rows, dimension: str) -> dict[tuple[str, str], Rows]:
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        if row["dimension"] == dimension:
            found.setdefault((row["pruner"], row["technique"]), []).append(row)
    return found
