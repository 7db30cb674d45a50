"""Step sizes of recipes that are to reach an error sooner, on validation text: single windows from the same inputs.

SmolLM2-135M, SparseGPT 50 %, a calibration set that `bench_time_to_error.py` does not measure on. The pruned chain is trained
by one short recipe throughout. At some windows all recipes start from the same weights, masks and inputs, one after the
other, and the window is put back after each: the loss at each epoch's end is a point (the error of the window's output,
per element, and relative per token, on calibration and on validation text), with the seconds so far, whose floor is the arithmetic of a window's training steps and of least squares. An arm is a technique.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from recipes import SHORT, STUDY, TECHNIQUES, Recipe, floor_of, loop_of, plan_for
from timing import Measure, Rows

from reprune.engine.activations import compare
from reprune.engine.chains import Chains
from reprune.engine.fitting import Fit
from reprune.engine.loop import BlockLoop
from reprune.engine.observing import collect, collect_pairs
from reprune.engine.windows import BlockWindow
from reprune.operations import Visits
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
    known = {recipe.name for recipe in found}
    found += {it.name: it for own in SHORT.values() for it in own if it.name not in known}.values()
    return found


@dataclass
class Trying(BlockLoop):
    """A loop that tries recipes at some windows before it trains them; `points` are what came of it.

    `floors` are the seconds that fitting one block by a recipe cannot do without.
    """

    recipes: list[Recipe] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
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
        super()._reconstruct(chains, window, number)

    def _try(self, chains: Chains, window: BlockWindow, recipe: Recipe) -> list[dict[str, Any]]:
        """A point at the start, after least squares, at the end of each epoch and after that of the last layer."""
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
        if technique.last_layer_iterations:
            note()
        points[-1]["floor_seconds"] = self.floors[recipe.name] * (window.stop - window.first)
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
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._since


SET = 11
"""The calibration set."""
SETTINGS = ("windows_tried", "override")
ONE_ROUND = True


def arms(config: pytest.Config) -> list[str]:
    """Techniques."""
    return list(TECHNIQUES)


def test_recipes(arm: str, measure: Measure, rows: Rows, kept: Rows, request: pytest.FixtureRequest) -> None:
    """All recipes of one technique at some windows."""
    given = request.config.getoption
    validation = ["~calibration@probes.held_out", "+calibration@validation.web=web"]
    validation += ["validation.web.num_sequences=8"]
    overrides = [f"calibration.set={SET}", f"threads={given('threads')}", *validation, *given("override")]
    found = measure(lambda: tried(arm, given("windows_tried"), overrides))
    rows += found
    kept += found


def tried(technique: str, windows: list[int], overrides: list[str]) -> Rows:
    """A row a window, recipe and point."""
    with TemporaryDirectory() as place:
        plan = plan_for(technique, Path(place), overrides)
        floors = {recipe.name: floor_of(recipe, plan) / Visits.of(plan).trained for recipe in recipes()}
        own = {"recipes": recipes(), "windows": windows, "floors": floors}
        chain = CHAIN.of(plan.technique)
        loop = loop_of(Trying, plan, chain, max(windows) + 2, Path(place), lambda *_: None, **own)
        loop.run()
        assert isinstance(loop, Trying)
    return [{"technique": technique, **point} for point in loop.points]


def test_table(rows: Rows, printed: Rows) -> None:
    """A row a recipe: the end of its training and × what it is of the study's recipe's at the same windows."""
    ends = {(row["technique"], row["recipe"], row["window"]): row for row in rows}
    for technique, recipe in dict.fromkeys((technique, recipe) for technique, recipe, _ in ends):
        windows = [window for *arm, window in ends if arm == [technique, recipe]]
        pairs = [(ends[technique, recipe, it], ends[technique, "study", it]) for it in windows]
        seconds = sum(own["seconds"] for own, _ in pairs)
        row = {"technique": technique, "recipe": recipe, "seconds": seconds}
        row["share"] = sum(own["floor_seconds"] for own, _ in pairs) / seconds
        for key in ("seconds", "calibration", "validation", "validation_relative"):
            ratios = [own[key] / study[key] for own, study in pairs]
            row[f"{key.replace('validation_', '')}_×"] = (median if key == "seconds" else mean)(ratios)
            if key in ("calibration", "validation_relative"):
                row["its_worst" if key == "calibration" else "worst"] = max(ratios)
        printed.append(row)
