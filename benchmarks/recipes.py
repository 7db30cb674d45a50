"""What `bench_step_sizes.py` and `bench_time_to_error.py` compare: the study's recipe and others, and one run's loop that any of them may train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from floors import bare_rates

from reprune.arithmetic import FLOOR, guessed_stages
from reprune.calibration.roles import Texts
from reprune.check import RunPlan, check
from reprune.compose import compose_run, prepare
from reprune.engine.activations import Stores
from reprune.engine.loop import BlockLoop
from reprune.engine.state import RunState
from reprune.engine.windows import BlockWindow
from reprune.measured_plan import pruning_plan
from reprune.model.loading import load_model
from reprune.reconstruction.least_squares import LeastSquares
from reprune.reconstruction.technique import Technique
from reprune.resources import StageMeter

TECHNIQUES = ("br", "br_gp", "br_gp_cr")
STUDY: dict[str, Any] = {"epochs": 5, "learning_rate": 2e-4}


@dataclass(frozen=True)
class Recipe:
    """How a technique is fitted: fields of `Technique` in place of its preset's; iterations of least squares before it."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 0

    def of(self, technique: Technique) -> Technique:
        """The technique fitted in this way."""
        start = LeastSquares(min_iterations=self.iterations, max_iterations=self.iterations) if self.iterations else None  # fmt: skip
        return replace(technique, **self.changes, layerwise=start)


NOTHING = Recipe("none", {"epochs": 0})
"""The pruner alone."""


_BFLOAT16 = {"training_dtype": "bfloat16"}
_WARM = {"epochs": 1, "lr_schedule": "cosine", "warmup": 0.25, **_BFLOAT16}
SHORT = {
    "br": [
        Recipe("2 CG, 1 × 0.001 bf16", {"epochs": 1, "learning_rate": 1e-3, **_BFLOAT16}, 2),
        Recipe("2 CG, 1 × 0.001 warm bf16", {**_WARM, "learning_rate": 1e-3}, 2),
        Recipe("1 × 0.0007 warm bf16, last 2", {**_WARM, "learning_rate": 7e-4, "last_layer_iterations": 2}),
    ],
    "br_gp": [
        Recipe("1 × 0.0007 warm bf16, last 2", {**_WARM, "learning_rate": 7e-4, "last_layer_iterations": 2}),
        Recipe("1 × 0.001 warm bf16, last 1", {**_WARM, "learning_rate": 1e-3, "last_layer_iterations": 1}),
    ],
    "br_gp_cr": [
        Recipe("1 × 0.0005 warm bf16, last 4", {**_WARM, "learning_rate": 5e-4, "last_layer_iterations": 4}),
        Recipe(
            "2 × 0.0003 bf16, last 2",
            {"epochs": 2, "learning_rate": 3e-4, "last_layer_iterations": 2, **_BFLOAT16},
        ),
    ],
}
"""By technique: steps in bfloat16, and least squares of a window's last layer after them. `warm`: a quarter of it warm-up, then a cosine."""


class Silent:
    """A listener of the loop that is told and does nothing."""

    def window(self, window: BlockWindow, num_blocks: int, steps: int) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""

    def frozen(self, row: Mapping[str, Any]) -> None:
        """Nothing."""


def floor_of(recipe: Recipe, plan: RunPlan) -> float:
    """Seconds that fitting a whole model by `recipe` cannot do without: its products at the rate of bare ones."""
    with bare_rates(plan):
        own, pruning = (
            guessed_stages(replace(plan, technique=technique), FLOOR)
            for technique in (recipe.of(plan.technique), NOTHING.of(plan.technique))
        )
    return sum(own[stage] - pruning[stage] for stage in ("statistics", "pruning", "reconstruction"))


def plan_for(technique: str, folder: Path, overrides: list[str]) -> RunPlan:
    """The plan of a run: SparseGPT 50 %, 8 × 256 tokens of C4, batches of one sequence."""
    prepare()
    plan = check(
        compose_run(
            [
                f"reconstruction={technique}",
                "reconstruction.batch_size=1",
                "calibration.num_sequences=8",
                "evaluation=none",
                "tracking=jsonl",
                "device=cpu",
                "dtype=float32",
                *(f"~calibration@probes.{name}" for name in ("wiki", "code")),
                f"output_dir={folder}",
                *overrides,
            ]
        )
    )
    plan.device.settle()
    return plan


def loop_of(
    kind: type[BlockLoop],
    plan: RunPlan,
    technique: Technique,
    num_blocks: int | None,
    folder: Path,
    after_commit: Callable[[int, list[dict[str, Any]], list[dict[str, Any]]], None],
    **more: Any,
) -> BlockLoop:
    """A loop of `kind` over the first `num_blocks` of a fresh model (None: all), its state below `folder`."""
    model = load_model(plan.source, plan.tokenizer, plan.device)
    if num_blocks is not None:
        del model.blocks[num_blocks:]
    texts: Texts = plan.texts(model)
    stores = Stores(plan.device.dtype, plan.shapes.hidden_size, folder / "activations", False)
    meter = StageMeter(plan.device)
    return kind(
        model=model,
        texts=texts,
        pruning=pruning_plan(plan, model, texts, stores, meter),
        technique=technique,
        stores=stores,
        state=RunState(folder / "state"),
        meter=meter,
        listener=Silent(),
        seed_training=plan.seed_training,
        after_commit=after_commit,
        **more,
    )
