"""What is pruned how, where that takes the dense model: allocations that visit it, gradients of its loss, coupled units."""

from __future__ import annotations

from collections import defaultdict

from reprune.calibration.roles import Texts
from reprune.engine.activations import Stores
from reprune.engine.dense_pass import DensePass
from reprune.engine.fitting import NO_LAST_LAYER
from reprune.engine.gradients import ModelGradients
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.state import RunState
from reprune.engine.units import couplings_of
from reprune.errors import RunError
from reprune.model.loading import LoadedModel
from reprune.resources import StageMeter
from reprune.rounds import measured_rounds
from reprune.run_plan import RunPlan


def check_coupled(plan: RunPlan, model: LoadedModel) -> None:
    """RunError for layers that belong to no unit which can go as a whole, where the pattern wants such."""
    if not plan.pattern.units or not plan.pruner.needs.prunes:
        return
    by_block = defaultdict[int, list[str]](list)
    for name in plan.shapes.targets:
        block, _, layer = name.partition(".")
        by_block[int(block)].append(layer)
    for number, layers in by_block.items():
        couplings_of(model, number, layers)


def check_last_layers(plan: RunPlan, model: LoadedModel) -> None:
    """RunError for blocks whose last layer cannot be solved against the window's output, where that is asked for."""
    if not plan.technique.last_layer_iterations or plan.technique.granularity != "block":
        return
    for block in range(len(model.blocks)):
        if model.last_added(block) is None:
            raise RunError(f"block {block}: {NO_LAST_LAYER}")


def pruning_plan(
    plan: RunPlan, model: LoadedModel, texts: Texts, stores: Stores, meter: StageMeter
) -> PruningPlan:
    """What is pruned how; what an allocation or a method reads of the dense model is measured here, once a run."""
    gradients = _gradients(plan, model, texts, stores, meter)
    rounds = plan.rounds
    if rounds is None:
        layers = plan.shapes.to_allocate
        with meter.stage("allocation"):
            dense = DensePass(
                model, texts, layers, plan.pruner, plan.pattern, stores, plan.seed_training, gradients
            )
            rounds = measured_rounds(plan.allocation, dense, plan.steps, plan.folder.path / "allocation.json")
    return PruningPlan(
        plan.pruner,
        plan.pattern,
        rounds,
        plan.seed_training,
        plan.schedule.masks,
        plan.schedule.reconstruct,
        plan.refinement,
        gradients,
    )


def _gradients(
    plan: RunPlan, model: LoadedModel, texts: Texts, stores: Stores, meter: StageMeter
) -> ModelGradients | None:
    """Of the dense model, made where they are needed, not there yet, and any block is still to be pruned."""
    if not plan.needs.gradients:
        return None
    state = RunState(plan.folder.state)
    gradients = ModelGradients(state.folder / "gradients")
    if not gradients.made and state.windows_done() < plan.num_windows:
        named, targets = plan.needs.gradient_text, set(plan.shapes.targets)
        wanted = [
            {name: view for name, view in views.items() if f"{block}.{name}" in targets}
            for block, views in enumerate(model.linears)
        ]
        with meter.stage("gradients"):
            read = [text for text in texts.mask if named in (None, text.name)]
            gradients.make(model, read, wanted, stores)
    return gradients
