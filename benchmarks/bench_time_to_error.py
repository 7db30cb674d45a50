"""How soon a recipe reaches the calibration error that the study's recipe ends with, and with what error on other text.

SmolLM2-135M, SparseGPT 50 %, 8 × 256 tokens of C4, through the real block loop, over the first blocks or all. All recipes
of a technique start from the same weights and texts, and take turns window by window, each on a model of its own, so
that other work on the machine disturbs them alike. Seconds are of statistics, pruning and reconstruction, less those that the run without reconstruction (`none`) takes to prune; their floor is the arithmetic of
the training steps and of least squares. Recipes and rates were chosen on another calibration set and on validation text,
over the first blocks and by `bench_step_sizes.py`. The CSV has a row a recipe and block. An arm is a technique. Beside other work --benchmark-timer=time.process_time is best.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from recipes import NOTHING, SHORT, STUDY, TECHNIQUES, Recipe, floor_of, loop_of, plan_for
from timing import Measure, Rows

from reprune.engine.loop import BlockLoop

STAGES = ("statistics", "pruning", "reconstruction")
SECONDS = "seconds_of_all_blocks"
SETTINGS = ("set", "first", "override")
ONE_ROUND = True


def arms(config: pytest.Config) -> list[str]:
    """Techniques."""
    return list(TECHNIQUES)


def test_recipes(arm: str, measure: Measure, rows: Rows, kept: Rows, request: pytest.FixtureRequest) -> None:
    """All recipes of one technique."""
    given = request.config.getoption
    overrides = [f"calibration.set={given('set')}", f"threads={given('threads')}"]
    overrides += ["probes.held_out.num_sequences=8", *given("override")]
    found = measure(lambda: side_by_side(arm, given("first"), overrides))
    for row in found:
        rows.append({"technique": arm, **row})
    kept += rows[-len(found) :]


def test_table(rows: Rows, printed: Rows) -> None:
    """A row a recipe: its seconds, and × what they and the errors are of the study's."""
    by_recipe: dict[tuple[str, str], Rows] = {}
    for row in rows:
        by_recipe.setdefault((row["technique"], row["recipe"]), []).append(row)
    for (technique, recipe), own in by_recipe.items():
        last, study = own[-1], by_recipe[technique, "study"][-1]
        times = {
            f"{name}_×": last[key] / study[key]
            for name, key in (("seconds", SECONDS), ("calibration", "calibration"), ("held-out", "held_out"))
        }
        printed.append(
            {
                "technique": technique,
                "recipe": recipe,
                "seconds": last[SECONDS],
                "share": last["share"],
                **times,
                "relative": mean(row["calibration_relative"] for row in own),
                "held-out_relative": mean(row["held_out_relative"] for row in own),
            }
        )


def side_by_side(technique: str, num_blocks: int | None, overrides: list[str]) -> Rows:
    """A row a recipe and block: seconds of all blocks, errors after it."""
    recipes = [NOTHING, Recipe("study", STUDY), *SHORT[technique]]
    turns, rows = Turns(len(recipes)), Rows()
    with TemporaryDirectory() as place:
        plan, loops = plan_for(technique, Path(place), overrides), []
        for number, recipe in enumerate(recipes):
            own, passing = Path(place) / str(number), turns.passing(number)
            loops.append(loop_of(BlockLoop, plan, recipe.of(plan.technique), num_blocks, own, passing))
        turns.run([loop.run for loop in loops])
        pruning: dict[str, float] = {}
        for recipe, loop in zip(recipes, loops, strict=True):
            total = sum(loop.meter.seconds.get(stage, 0.0) for stage in STAGES)
            pruning[recipe.name] = total
            seconds = total - pruning["none"]
            floor = floor_of(recipe, plan) * len(loop.model.blocks) / plan.shapes.num_blocks
            for row in loop._progress.rows:
                after = {role: next(iter(texts.values())) for role, texts in row["after"].items()}
                rows.append(
                    {
                        "recipe": recipe.name,
                        "block": row["block"],
                        SECONDS: seconds,
                        "share": floor / seconds if seconds else None,
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
