"""How seconds grow with tokens, hidden size, blocks and window: by stage, beside what `dry_run` guesses.

Whole runs of a random model on random tokens through the real pipeline, one process, one thread: Wanda and SparseGPT ×
none, br_gp and br_gp_cr. One dimension at a time leaves the middle (`BASE`). Printed are growth exponents, slopes of log
seconds over log size fitted to the sizes of a dimension: of all of them, and of the largest two alone, since small sizes are
all overhead; the median over the arms that have the stage. Then how many times the guess a run took, and the share of its
floor that it reached, by arithmetic (`reprune.arithmetic.FLOOR`), from the smallest to the largest size. Every run is a row of
the CSV; of several rounds the least seconds of a stage are. With --benchmark-timer=time.process_time all clocks are of
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
import torch
from timing import Measure, Rows

from reprune.arithmetic import FLOOR, guessed_stages, product_rate
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
WARM_UP = False


def arms(config: pytest.Config) -> list[str]:
    """Sizes of a dimension × pruners × techniques; before them one run that loads what all others find loaded."""
    return [FIRST, *POINTS]


FIRST = "first"
POINTS = {
    f"{dimension} {size} {pruner} {technique}": (dimension, size, pruner, technique)
    for dimension, sizes in SIZES.items()
    for size, pruner, technique in product(sizes, PRUNERS, TECHNIQUES)
    # A window of another size is br_gp's; CR's is two.
    if dimension != "window" or technique == "br_gp"
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Measured]]:
    """What each run took in every round, beside what was guessed and what cannot be spared."""
    return {}


def test_run(arm: str, measure: Measure, found: dict[str, list[Measured]]) -> None:
    """One run."""
    if arm == FIRST:
        measure(lambda: measured(PRUNERS[0], TECHNIQUES[0], BASE))
        return
    dimension, size, pruner, technique = POINTS[arm]
    took = measure(lambda: measured(pruner, technique, {**BASE, dimension: size}))
    found.setdefault(arm, []).append(took)


def test_rows(found: dict[str, list[Measured]], rows: Rows, kept: Rows) -> None:
    """What the rounds come to."""
    rate = product_rate(torch.device("cpu"), torch.float32, 1)
    for arm, rounds in found.items():
        dimension, size, pruner, technique = POINTS[arm]
        row = {"dimension": dimension, "size": size, "pruner": pruner, "technique": technique}
        rows.append({**row, **sums(rounds), "product_gflops": rate / 1e9})
    kept += rows


def test_exponents(rows: Rows, printed: Rows) -> None:
    """Growth by stage."""
    printed += exponents(rows)


def test_guesses(rows: Rows, printed: Rows) -> None:
    """By how much the guess is off."""
    printed += by_size(rows, "times the guess", "off")


def test_shares(rows: Rows, printed: Rows) -> None:
    """What share of its floor a run reaches."""
    printed += by_size(rows, "share", "share")


Measured = tuple[dict[str, float], dict[str, float], float]
"""Seconds of a run by stage, those guessed, and the floor of all of it."""


def sums(rounds: list[Measured]) -> dict[str, float]:
    """Seconds and guessed seconds of one run done several times, in all and by stage."""
    stages = {stage: min(seconds[stage] for seconds, _, _ in rounds) for stage in rounds[0][0]}
    took, guess = sum(stages.values()), sum(rounds[0][1].values())
    return {
        "seconds": took,
        "guessed_seconds": guess,
        "off": took / guess,
        "share": rounds[0][2] / took,
        **{f"seconds/{stage}": value for stage, value in stages.items()},
        **{f"guessed/{stage}": value for stage, value in rounds[0][1].items()},
    }


def measured(pruner: str, technique: str, sizes: dict[str, int]) -> Measured:
    """One run."""
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
                    "threads=1",
                    "device=cpu",
                    f"output_dir={place}",
                ]
            )
        )
        floor = sum(guessed_stages(plan, FLOOR).values())
        return dict(run(plan)["seconds"]), guessed_stages(plan), floor


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
