"""How much of which layer goes in which round: by sizes before anything is loaded, else from the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reprune.calibration.gather import Request
from reprune.engine.dense_pass import DensePass
from reprune.errors import ConfigError
from reprune.files import read_json, write_json
from reprune.pruning.contract import LayerShape, Needs, Pruner, ScorePruner, UnitPruner
from reprune.pruning.refinement import Refinement
from reprune.reconstruction.technique import Technique
from reprune.sparsity.allocation import Layers, ModelAllocation, SizeAllocation, Wanted
from reprune.sparsity.patterns import Pattern
from reprune.sparsity.schedule import Schedule
from reprune.sparsity.uniform import Uniform
from reprune.transform.contract import Transform


def allocated(
    allocation: SizeAllocation | ModelAllocation,
    layers: Layers,
    pruner: Pruner,
    pattern: Pattern,
    steps: Sequence[float],
    validation: Sequence[str],
) -> list[dict[str, float]] | None:
    """Sparsities by layer for each of `steps`; None for an allocation that reads the model.

    ConfigError for a pattern that has one sparsity for all layers beside an allocation that gives each its own, and for
    whatever the allocation cannot do with.
    """
    if not isinstance(allocation, Uniform) and not pattern.varies:
        raise ConfigError(
            "allocation",
            "the pattern has the same sparsity in every layer, so that there is nothing to allocate",
            value=type(allocation).__name__,
            accepted="uniform with this pattern",
            hint="pattern=unstructured, or N:M with counts by block: pattern=mixed_of_8",
        )
    if not pruner.needs.prunes:
        return [dict.fromkeys(layers.shapes, step) for step in steps]
    allocation.check(Wanted(layers, pruner, pattern, steps, validation))
    if isinstance(allocation, ModelAllocation):
        return None
    num_weights = layers.num_weights
    return [pattern.settle(allocation.allocate(layers, step), num_weights) for step in steps]


def measured_rounds(
    allocation: SizeAllocation | ModelAllocation, view: DensePass, steps: Sequence[float], kept: Path
) -> list[dict[str, float]]:
    """Sparsities by layer for each of `steps`, from the dense model.

    They are kept in the file `kept`, so that a run that goes on has the same.
    """
    assert isinstance(allocation, ModelAllocation)
    ranks = view.model.plan.ranks
    if not ranks.tell(kept.is_file()):
        num_weights = view.layers.num_weights
        shares = [view.pattern.settle(found, num_weights) for found in allocation.allocate_for(view, steps)]
        if ranks.first:
            write_json(kept, {"rounds": shares})
    found: list[dict[str, float]] = ranks.tell(read_json(kept)["rounds"] if ranks.first else None)
    return found


def check_units(
    pattern: Pattern,
    pruner: Pruner,
    refinement: Refinement | None,
    technique: Technique,
    schedule: Schedule,
    layers: Sequence[LayerShape],
) -> None:
    """ConfigError for what cannot go with units of several layers."""
    if not pattern.units or not pruner.needs.prunes:
        return
    problem = "units of several layers go as a whole by the sum of the scores of their weights"
    if not isinstance(pruner, ScorePruner | UnitPruner):
        raise ConfigError(
            "pattern", f"{problem}, and this pruner has none", value=type(pruner).__name__,
            accepted="a pruner that is a score: magnitude, wanda, ria, snip, fisher, …", hint="pruner=snip is LLM-Pruner's",
        )  # fmt: skip
    if refinement is not None:
        raise ConfigError("refine", f"{problem}: no weight can be swapped", value=type(refinement).__name__, accepted="null")  # fmt: skip
    if schedule.masks == "free" and len(schedule.steps(0.5)) > 1:
        raise ConfigError(
            "schedule.masks", "a unit that went puts out nothing, so that no score could bring it back", value="free",
            accepted="monotone with units", hint="schedule=iterative",
        )  # fmt: skip
    if technique.within_block == "sequential":
        raise ConfigError(
            "reconstruction.within_block", f"{problem}, so that all layers of a block are pruned at once",
            value=technique.within_block, accepted="together",
        )  # fmt: skip
    if any(layer.expert for layer in layers):
        raise ConfigError(
            "targets", "experts have no units that go as a whole", value="all", accepted="attention", hint="targets=attention"
        )  # fmt: skip


def check_compact(
    pattern: Pattern,
    allocation: SizeAllocation | ModelAllocation,
    targets: Sequence[str],
    num_blocks: int,
    *,
    brought: bool,
) -> None:
    """ConfigError for a smaller model that no config could describe: all its blocks must be of the same sizes.

    Masks that are there already (`brought`) may be of whole units; whether they are is seen in the end.
    """
    if not pattern.units and not brought:
        raise ConfigError(
            "export.compact", "only whole units can be left out of a model, and this pattern removes single weights",
            value=type(pattern).__name__, accepted="pattern=structured", hint="export.model=true writes the model with its zeros",
        )  # fmt: skip
    if not isinstance(allocation, Uniform):
        raise ConfigError(
            "export.compact", "the config of a model has one size for all blocks, and this allocation gives each its own",
            value=type(allocation).__name__, accepted="allocation=uniform",
        )  # fmt: skip
    chosen = {int(name.partition(".")[0]) for name in targets}
    if len(chosen) < num_blocks:
        raise ConfigError(
            "export.compact", "the config of a model has one size for all blocks, and some are not pruned",
            value=f"{len(chosen)} of {num_blocks} blocks", accepted="target_blocks=all",
        )  # fmt: skip


def check_order(
    pattern: Pattern, pruner: Pruner, refinement: Refinement | None, steps: Sequence[float]
) -> None:
    """ConfigError for what would go on with a mask whose groups are of permuted channels."""
    if pattern.columns is None or not (isinstance(pruner, ScorePruner) and pruner.reorders):
        return
    if refinement is not None or len(steps) > 1:
        raise ConfigError(
            "pruner.permute", "the groups of its mask are not the pattern's own, so that no other step can keep to them",
            value=True, accepted="false with `refine` and with several rounds", hint="pruner.permute=false",
        )  # fmt: skip


def check_refinement(refinement: Refinement | None, pruner: Pruner) -> None:
    """ConfigError for a refinement of masks that are not chosen here."""
    if refinement is not None and not pruner.needs.prunes:
        raise ConfigError(
            "refine",
            "nothing is pruned that could be refined",
            value=type(refinement).__name__,
            accepted="null",
        )


def check_masks_fit(transform: Transform) -> None:
    """ConfigError for masks that are there already beside a transform after which blocks have other numbers."""
    if transform.renumbers:
        raise ConfigError(
            "pruner", "its masks are of numbered blocks, and the transform numbers them anew",
            value="masks that are there already", accepted="a pruner that makes its own masks, with this transform",
            hint="prune and export the model (export.model=true), and give that to the other run as model=local",
        )  # fmt: skip


def check_gradient_text(needs: Needs, requests: Sequence[Request]) -> None:
    """ConfigError where the text that gradients are wanted on is no part of the mask data, or nothing but it is."""
    names = [request.name for request in requests if request.use == "mask"]
    if needs.statistics_without is not None and set(names) == {needs.statistics_without}:
        raise ConfigError(
            "pruner", "the mask data are this text alone, and statistics are wanted of other text",
            value=needs.statistics_without, accepted="the name of one of several parts",
            hint="calibration=mixture, with general text beside the domain's; or pruner.domain=null for both on the same text",
        )  # fmt: skip
    if needs.gradient_text is not None and needs.gradient_text not in names:
        raise ConfigError(
            "pruner", "the mask data have no part of this name to take gradients on", value=needs.gradient_text,
            accepted=names, hint="calibration=mixture, with the domain's text as one of its parts",
        )  # fmt: skip


def check_nothing_else_decides(sparsity: float | None, allocation: object, schedule: Schedule) -> None:
    """ConfigError for choices that masks which are there already leave nothing to decide for."""
    problem = "the pruner brings its own masks, which nothing else decides"
    if sparsity is not None:
        raise ConfigError("sparsity", problem, value=sparsity, accepted="null", hint="sparsity=null")
    if not isinstance(allocation, Uniform):
        raise ConfigError("allocation", problem, value=type(allocation).__name__, accepted="uniform")
    if len(schedule.steps(0.5)) > 1:
        raise ConfigError("schedule", problem, value=type(schedule).__name__, accepted="one_shot")
