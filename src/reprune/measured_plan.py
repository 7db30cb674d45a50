"""What is pruned how, where that takes the dense model: allocations that visit it, gradients of its loss, coupled units."""

from __future__ import annotations

from reprune.calibration.roles import Texts
from reprune.check import RunPlan
from reprune.engine.activations import Stores
from reprune.engine.dense_pass import DensePass
from reprune.engine.gradients import ModelGradients
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.state import RunState
from reprune.engine.units import couplings_of
from reprune.model.loading import LoadedModel
from reprune.resources import StageMeter
from reprune.rounds import measured_rounds


def pruning_plan(
    plan: RunPlan, model: LoadedModel, texts: Texts, stores: Stores, meter: StageMeter
) -> PruningPlan:
    """What is pruned how; what an allocation or a method reads of the dense model is measured here, once a run."""
    state = RunState(plan.folder.state)
    layers = plan.shapes.to_allocate
    rounds = plan.rounds
    if rounds is None:
        with meter.stage("allocation"):
            dense = DensePass(model, texts, layers, plan.pruner, plan.pattern, stores, plan.seed_training)
            rounds = measured_rounds(plan.allocation, dense, plan.steps, plan.folder.path / "allocation.json")
    if plan.pattern.units and plan.pruner.needs.prunes:
        # What belongs to no unit is told before any time is spent.
        first, _, _ = next(iter(layers.shapes)).partition(".")
        names = [name.partition(".") for name in layers.shapes]
        couplings_of(model, int(first), [name for block, _, name in names if block == first])
    gradients = ModelGradients(state.folder / "gradients") if plan.needs.gradients else None
    pruning = PruningPlan(
        plan.pruner,
        plan.pattern,
        rounds,
        plan.seed_training,
        plan.schedule.masks,
        plan.schedule.reconstruct,
        plan.refinement,
        gradients,
    )
    if gradients is not None and not gradients.made and state.windows_done() < plan.num_windows:
        with meter.stage("gradients"):
            every = [pruning.layers(model, block) for block in range(len(model.blocks))]
            named = plan.needs.gradient_text
            read = [text for text in texts.mask if named in (None, text.name)]
            gradients.make(model, read, every, stores)
    return pruning
