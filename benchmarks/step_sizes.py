"""Step sizes of recipes that are to reach an error sooner, on validation text: single windows from the same inputs.

SmolLM2-135M, SparseGPT 50 %, a calibration set that `time_to_error.py` does not measure on. The pruned chain is trained
by one short recipe throughout. At some windows all recipes start from the same weights, masks and inputs, one after the
other, and the window is put back after each: the loss at each epoch's end is a point (the error of the window's output,
per element, and relative per token, on calibration and on validation text), with the seconds of processor time so far.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from machine import machine
from recipes import STUDY, TECHNIQUES, Recipe, loop_of, plan_for
from rich.console import Console
from rich.table import Table

from reprune.engine.activations import compare
from reprune.engine.chains import Chains
from reprune.engine.fitting import Fit
from reprune.engine.loop import BlockLoop
from reprune.engine.observing import collect, collect_pairs
from reprune.engine.windows import BlockWindow
from reprune.reconstruction.least_squares import LeastSquares

CHAIN = Recipe("chain", {"epochs": 1, "learning_rate": 5e-4})


def recipes() -> list[Recipe]:
    """The study's, and those that are tried."""
    found = [Recipe("study", STUDY)]
    for epochs, rate in ((1, 3e-4), (1, 5e-4), (1, 1e-3), (1, 2e-3), (2, 5e-4)):
        found.append(Recipe(f"{epochs} × {rate:g}", {"epochs": epochs, "learning_rate": rate}))
    changes = {"epochs": 1, "learning_rate": 1e-3, "lr_schedule": "cosine", "warmup": 0.25}
    found.append(Recipe("1 × 0.001 cosine, warm", changes))
    for iterations, rate in product((2, 4), (5e-4, 1e-3)):
        name = f"{iterations} CG, 1 × {rate:g}"
        found.append(Recipe(name, {"epochs": 1, "learning_rate": rate}, iterations))
    return found


@dataclass
class Trying(BlockLoop):
    """A loop that tries recipes at some windows before it trains them; `points` are what came of it."""

    recipes: list[Recipe] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def _keeps_dense_weights(self) -> bool:
        return True

    def _reconstruct(self, chains: Chains, window: BlockWindow, number: int | None) -> None:
        if window.index in self.windows:
            blocks = [self.model.blocks[block] for block in range(window.first, window.stop)]
            begun = [{name: it.detach().clone() for name, it in block.named_parameters()} for block in blocks]
            for recipe in self.recipes:
                self.points += self._try(chains, window, recipe)
                with torch.no_grad():
                    for block, tensors in zip(blocks, begun, strict=True):
                        for name, parameter in block.named_parameters():
                            parameter.copy_(tensors[name])
                point = self.points[-1]
                print(f"window {window.index:>2} {recipe.name:<22}{point['seconds']:>7.2f} s {point['calibration']:.4g} {point['validation']:.4g}", file=sys.stderr)  # fmt: skip
        super()._reconstruct(chains, window, number)

    def _try(self, chains: Chains, window: BlockWindow, recipe: Recipe) -> list[dict[str, Any]]:
        """A point at the start, after least squares, and at the end of each epoch."""
        technique = recipe.of(self.technique)
        points: list[dict[str, Any]] = []
        clock = _Clock()
        samples = sum(len(text.tokens_NT) for text in self.texts.reconstruction)
        steps = 0

        def note() -> None:
            clock.stop()
            points.append(
                {
                    "recipe": recipe.name,
                    "window": window.index,
                    "steps": steps,
                    "seconds": clock.seconds,
                    **self._errors_of(chains, window),
                }
            )
            clock.go()

        def step() -> None:
            nonlocal steps
            steps += 1
            if steps % samples == 0:
                note()

        clock.go()
        note()
        if recipe.iterations:
            self._solve(chains, window, recipe, clock)
            note()
        Fit(
            chains=chains,
            texts=self.texts,
            technique=replace(technique, layerwise=None),
            blocks=range(window.first, window.stop),
            masks=self._progress.masks,
            dense_weights=self._dense_weights,
            seed=self.seed_training,
            purpose=(window.index,),
            on_step=step,
            thinned=self.pruning.thinned(window.first),
        ).run()
        return points

    def _solve(self, chains: Chains, window: BlockWindow, recipe: Recipe, clock: _Clock) -> None:
        """Least squares of the new block; the Grams are the pruner's, and cost nothing."""
        for block in range(window.new, window.stop):
            inputs = chains.pruned
            clock.stop()
            for earlier in range(window.first, block):
                inputs = chains.through(earlier, inputs)
            views = self.model.linears[block]
            statistics = collect(chains, block, inputs, self.texts.mask, views, True)
            clock.go()
            pairs: dict[str, Any] = {}
            if self.technique.target_chain == "dense":
                leaders = {id(found): name for name, found in reversed(statistics.items())}
                own = {name: views[name] for name in leaders.values()}
                weights = self._dense_weights[block]
                texts = self.texts.reconstruction
                found = collect_pairs(chains, block, inputs, chains.dense[block], weights, texts, own)
                pairs = {name: found[leaders[id(it)]] for name, it in statistics.items()}
            for name, view in views.items():
                dense = view.orient(view.of(self._dense_weights[block][view.parameter]))
                keep = view.orient(self._progress.masks[block][name])
                solver = LeastSquares(min_iterations=recipe.iterations, max_iterations=recipe.iterations)
                view.write(solver.solve(dense, view.weight, keep, statistics[name], pairs.get(name), name).weight)  # fmt: skip

    def _errors_of(self, chains: Chains, window: BlockWindow) -> dict[str, float]:
        texts = [*self.texts.mask, *self.texts.validation]
        states = chains.pruned
        for block in range(window.first, window.stop):
            states = chains.through(block, states, texts)
        found = {}
        for role, text in zip(("calibration", "validation"), texts, strict=True):
            errors = compare(chains.dense[window.stop][text.key], states[text.key])
            found |= {role: errors["error"], f"{role}_relative": errors["relative"]}
        return found


class _Clock:
    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def go(self) -> None:
        self._since = time.process_time()

    def stop(self) -> None:
        self.seconds += time.process_time() - self._since


def main() -> None:
    """Try, write every point, print a table for each technique."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--techniques", nargs="+", default=list(TECHNIQUES), choices=TECHNIQUES)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 9, 16, 23])
    parser.add_argument("--set", type=int, default=11, help="the calibration set")
    parser.add_argument("--csv", type=Path, help="where every point is written")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    overrides = [
        f"calibration.set={given.set}",
        "~calibration@probes.held_out",
        "+calibration@validation.web=web",
        "validation.web.num_sequences=8",
        *given.overrides,
    ]
    rows: list[dict[str, Any]] = []
    console = Console(width=150 if not sys.stdout.isatty() else None, highlight=False)
    console.print(machine(1))
    for technique in given.techniques:
        with TemporaryDirectory() as place:
            plan = plan_for(technique, Path(place), overrides)
            chain = CHAIN.of(plan.technique)
            last = max(given.windows) + 2
            tried = {"recipes": recipes(), "windows": given.windows}
            loop = loop_of(Trying, plan, chain, last, Path(place), lambda *_: None, **tried)
            loop.run()
            assert isinstance(loop, Trying)
        rows += [{"technique": technique, **point} for point in loop.points]
        console.print(table(technique, loop.points))
        if given.csv:
            with given.csv.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def table(technique: str, points: list[dict[str, Any]]) -> Table:
    """A row a recipe: the end of its training beside that of the study's recipe at the same windows."""
    shown = Table(title=technique, box=None, header_style="bold", pad_edge=False)
    shown.add_column("recipe")
    for column in ("seconds", "× study", "calibration", "worst", "validation", "relative", "worst"):
        shown.add_column(column, justify="right", no_wrap=True)
    ends = {(point["recipe"], point["window"]): point for point in points}
    windows = list(dict.fromkeys(window for _, window in ends))
    for recipe in dict.fromkeys(recipe for recipe, _ in ends):
        pairs = [(ends[recipe, window], ends["study", window]) for window in windows]
        cells = [f"{sum(own['seconds'] for own, _ in pairs):.1f}"]
        for key in ("seconds", "calibration", "validation", "validation_relative"):
            ratios = [own[key] / study[key] for own, study in pairs]
            cells.append(f"{(median if key == 'seconds' else mean)(ratios):.3f}")
            if key in ("calibration", "validation_relative"):
                cells.append(f"{max(ratios):.3f}")
        shown.add_row(recipe, *cells)
    return shown


if __name__ == "__main__":
    main()
