"""What is pruned how, where that takes the dense model: allocations that visit it, gradients of its loss, coupled units."""

from __future__ import annotations

from collections import defaultdict

from reprune.calibration.roles import Texts
from reprune.engine.activations import Stores
from reprune.engine.dense_pass import DensePass
from reprune.engine.gradients import ModelGradients
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.state import RunState
from reprune.engine.units import couplings_of
from reprune.engine.windows import windows_over
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
    """RunError for windows whose last layer cannot be solved against their output, where that is asked for and to be done."""
    technique = plan.technique
    windows = windows_over(len(model.blocks), technique.window, technique.stride)
    pruned = {int(name.partition(".")[0]) for name in plan.shapes.targets}
    if technique.last_layer_iterations:
        for window in windows[RunState(plan.folder.state).windows_done() :]:
            if pruned & set(range(window.first, window.stop)):
                model.added_last(window.stop - 1)


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
