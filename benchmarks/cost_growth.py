"""How seconds grow with tokens, hidden size, blocks and window: by stage, beside what `dry_run` guesses.

Whole runs of a random model on random tokens through the real pipeline, one process, one thread: Wanda and SparseGPT ×
none, br_gp and br_gp_cr. One dimension at a time leaves the middle (`BASE`). A run is done `--repeats` times, and the
seconds of a stage are its least. All clocks are of processor time, which other work on the machine disturbs least and
which on one thread is what an idle machine takes but for waiting for a disk. Printed are growth exponents, slopes of log seconds over log size fitted to the sizes
of a dimension: of all of them, and of the largest two alone, since small sizes are all overhead; the median over the
arms that have the stage. Then how far off the guess was. Every run is a row of the CSV.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from itertools import product
from math import log
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from machine import machine
from rich.console import Console
from rich.table import Table

from reprune.arithmetic import guessed_stages, product_rate
from reprune.check import check
from reprune.compose import compose_run, prepare
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


def main() -> None:
    """Run, print exponents and guesses, write every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=Path("experiments/results/cost_growth.csv"))
    given = parser.parse_args()
    prepare()
    words, rows = machine(1), []
    with patch("time.perf_counter", time.process_time):
        rate = product_rate(torch.device("cpu"), torch.float32, 1)
        where = f"{words}, {rate / 1e9:.0f} GFLOP/s in a float32 product"
        # The first run of a process loads what all others find loaded.
        measured(PRUNERS[0], TECHNIQUES[0], BASE)
        for dimension, sizes in SIZES.items():
            for size, (pruner, technique) in product(sizes, product(PRUNERS, TECHNIQUES)):
                # A window of another size is br_gp's; CR's is two.
                if dimension == "window" and technique != "br_gp":
                    continue
                found = [measured(pruner, technique, {**BASE, dimension: size}) for _ in range(given.repeats)]
                row = {"dimension": dimension, "size": size, "pruner": pruner, "technique": technique}
                rows.append({**row, **told(found), "machine": where})
                print(*list(rows[-1].values())[:7], file=sys.stderr, flush=True)
            write(rows, given.csv)
    console = Console(width=130 if not sys.stdout.isatty() else None, highlight=False)
    console.print(f"{words}; {LENGTH} tokens a sequence; the middle: {BASE}")
    console.print(exponents(rows))
    console.print(guessed(rows))


def told(found: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, float]:
    """Seconds and guessed seconds of one run done several times, in all and by stage."""
    stages = {stage: min(seconds[stage] for seconds, _ in found) for stage in found[0][0]}
    took, guess = sum(stages.values()), sum(found[0][1].values())
    return {
        "seconds": round(took, 3),
        "guessed_seconds": round(guess, 3),
        "off": round(took / guess, 3),
        **{f"seconds/{stage}": round(value, 4) for stage, value in stages.items()},
        **{f"guessed/{stage}": round(value, 4) for stage, value in found[0][1].items()},
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """All rows so far; a stage that a run does not have is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "machine"))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*columns, "machine"], restval="")
        writer.writeheader()
        writer.writerows(rows)


def measured(pruner: str, technique: str, sizes: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by stage of one run, and those guessed."""
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
        return dict(run(plan)["seconds"]), guessed_stages(plan)


def exponents(rows: list[dict[str, Any]]) -> Table:
    """A row a stage: its growth in every dimension, of all sizes and of the largest two."""
    shown = Table(title="growth exponents: all sizes, the largest two", box=None, header_style="bold")
    shown.add_column("stage")
    for dimension in SIZES:
        shown.add_column(dimension, justify="right", no_wrap=True)
    stages = [name.removeprefix("seconds/") for name in rows[0] if name.startswith("seconds/")]
    stages += ["reconstruction"] if "reconstruction" not in stages else []
    for stage in [*stages, None]:
        column = "seconds" if stage is None else f"seconds/{stage}"
        cells = []
        for dimension, sizes in SIZES.items():
            slopes, ends = [], []
            for arm in product(PRUNERS, TECHNIQUES):
                found = {row["size"]: row.get(column, 0) for row in rows if (row["dimension"], row["pruner"], row["technique"]) == (dimension, *arm)}  # fmt: skip
                if found and min(map(float, found.values())) >= LEAST:
                    points = [(log(size), log(found[size])) for size in sizes]
                    slopes.append(float(np.polyfit(*zip(*points, strict=True), 1)[0]))
                    (x, y), (end_x, end_y) = points[-2:]
                    ends.append((end_y - y) / (end_x - x))
            cells.append(f"{median(slopes):.2f}, {median(ends):.2f}" if slopes else "")
        if any(cells):
            shown.add_row(stage or "whole run", *cells)
    return shown


def guessed(rows: list[dict[str, Any]]) -> Table:
    """A row an arm: how many times the guess a run took, from the smallest to the largest size of each dimension."""
    shown = Table(title="seconds over guessed seconds, by size", box=None, header_style="bold")
    for name in ("pruner", "technique", *SIZES):
        shown.add_column(name, justify="left" if name in ("pruner", "technique") else "right", no_wrap=True)
    for pruner, technique in product(PRUNERS, TECHNIQUES):
        cells = []
        for dimension in SIZES:
            own = [row for row in rows if (row["dimension"], row["pruner"], row["technique"]) == (dimension, pruner, technique)]  # fmt: skip
            cells.append(" ".join(f"{row['off']:.2g}" for row in own))
        shown.add_row(pruner, technique, *cells)
    return shown


if __name__ == "__main__":
    main()
