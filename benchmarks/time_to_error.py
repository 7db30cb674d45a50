"""How soon a recipe reaches the calibration error that the study's recipe ends with, and with what error on other text.

SmolLM2-135M, SparseGPT 50 %, 8 × 256 tokens of C4, through the real block loop, over the first blocks or all. All recipes
of a technique start from the same weights and texts, and take turns window by window, each on a model of its own, so
that other work on the machine disturbs them alike. Seconds are of processor time, of statistics, pruning and
reconstruction, less those that the run without reconstruction (`none`) takes to prune. Rates are those that
`step_sizes.py` fixed on validation text, on another calibration set. The CSV has a row a recipe and block.
"""

from __future__ import annotations

import argparse
import csv
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from machine import machine
from recipes import STUDY, TECHNIQUES, ProcessorMeter, Recipe, loop_of, plan_for
from rich.console import Console
from rich.table import Table

from reprune.engine.loop import BlockLoop

FASTER: dict[str, list[Recipe]] = {
    "br": [
        Recipe("1 × 0.001", {"epochs": 1, "learning_rate": 1e-3}),
        Recipe("2 CG, 1 × 0.001", {"epochs": 1, "learning_rate": 1e-3}, 2),
    ],
    "br_gp": [
        Recipe("1 × 0.001", {"epochs": 1, "learning_rate": 1e-3}),
        Recipe(
            "1 × 0.001 cosine, warm",
            {"epochs": 1, "learning_rate": 1e-3, "lr_schedule": "cosine", "warmup": 0.25},
        ),
    ],
    "br_gp_cr": [Recipe("1 × 0.0003", {"epochs": 1, "learning_rate": 3e-4})],
}
"""Of those that take about a third of the study's time, the ones with the lowest errors on validation text."""

NONE = Recipe("none", {"epochs": 0})
STAGES = ("statistics", "pruning", "reconstruction")


def main() -> None:
    """Run all recipes of each technique, print a table of each, write every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--techniques", nargs="+", default=list(TECHNIQUES), choices=TECHNIQUES)
    parser.add_argument("--blocks", type=int, help="the first blocks alone")
    parser.add_argument("--set", type=int, default=0, help="the calibration set")
    parser.add_argument("--csv", type=Path, help="where every row is written")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    overrides = [f"calibration.set={given.set}", "probes.held_out.num_sequences=8", *given.overrides]
    rows: list[dict[str, Any]] = []
    console = Console(width=130 if not sys.stdout.isatty() else None, highlight=False)
    console.print(machine(1))
    for technique in given.techniques:
        found = side_by_side(technique, given.blocks, overrides)
        rows += [{"technique": technique, "set": given.set, **row, "machine": machine(1)} for row in found]
        console.print(table(technique, found))
        if given.csv:
            with given.csv.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def side_by_side(technique: str, num_blocks: int | None, overrides: list[str]) -> list[dict[str, Any]]:
    """A row a recipe and block: seconds so far, errors after it."""
    recipes = [NONE, Recipe("study", STUDY), *FASTER[technique]]
    turns, rows = Turns(len(recipes)), []
    with TemporaryDirectory() as place:
        plan, loops = plan_for(technique, Path(place), overrides), []
        for number, recipe in enumerate(recipes):
            own, passing = Path(place) / str(number), turns.passing(number)
            loops.append(loop_of(BlockLoop, plan, recipe.of(plan.technique), num_blocks, own, passing))
        turns.run([loop.run for loop in loops])
        pruning = {}
        for recipe, loop in zip(recipes, loops, strict=True):
            assert isinstance(loop.meter, ProcessorMeter)
            total = sum(loop.meter.processor.get(stage, 0.0) for stage in STAGES)
            pruning[recipe.name] = total
            for row in loop._progress.rows:
                after = {role: next(iter(texts.values())) for role, texts in row["after"].items()}
                rows.append(
                    {
                        "recipe": recipe.name,
                        "block": row["block"],
                        "seconds_of_all_blocks": round(total - pruning["none"], 2),
                        "calibration": after["calibration"]["error"],
                        "held_out": after["probe"]["error"],
                        "calibration_relative": after["calibration"]["relative"],
                        "held_out_relative": after["probe"]["relative"],
                    }
                )
    return rows


class Turns:
    """Lets several loops go on in turns, a window each: one works while the others wait."""

    def __init__(self, count: int) -> None:
        self.waiting = [threading.Semaphore(0) for _ in range(count)]
        self.going = [True] * count
        self.failed: list[BaseException] = []

    def passing(self, number: int) -> Callable[..., None]:
        """What loop `number` calls after each window."""

        def after_commit(*_: Any) -> None:
            print(f"recipe {number}, a window", file=sys.stderr, flush=True)
            self._next(number)
            self.waiting[number].acquire()

        return after_commit

    def _next(self, number: int) -> None:
        order = [*range(number + 1, len(self.going)), *range(number + 1)]
        following = [other for other in order if self.going[other]]
        if following:
            self.waiting[following[0]].release()

    def run(self, work: list[Callable[[], Any]]) -> None:
        """Do all of it; raises what any of it raised."""

        def do(number: int) -> None:
            self.waiting[number].acquire()
            try:
                work[number]()
            except BaseException as error:
                self.failed.append(error)
            self.going[number] = False
            self._next(number)

        threads = [threading.Thread(target=do, args=(number,)) for number in range(len(work))]
        for thread in threads:
            thread.start()
        self.waiting[0].release()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]


def table(technique: str, rows: list[dict[str, Any]]) -> Table:
    """A row a recipe: its seconds and errors, and what they are of the study's."""
    shown = Table(title=technique, box=None, header_style="bold", pad_edge=False)
    shown.add_column("recipe")
    columns = (
        "seconds",
        "× study",
        "calibration",
        "× study",
        "held-out",
        "× study",
        "relative",
        "relative, held-out",
    )
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)
    study = by_recipe["study"][-1]
    for recipe, own in by_recipe.items():
        cells = []
        for key in ("seconds_of_all_blocks", "calibration", "held_out"):
            cells += [f"{own[-1][key]:.4g}", f"{own[-1][key] / study[key]:.3f}"]
        means = [
            f"{mean(row[key] for row in own):.4f}" for key in ("calibration_relative", "held_out_relative")
        ]
        shown.add_row(recipe, *cells, *means)
    return shown


if __name__ == "__main__":
    main()
