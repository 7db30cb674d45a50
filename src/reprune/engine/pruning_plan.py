"""What is pruned how, for the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reprune.engine.gradients import ModelGradients
from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import Needs, Pruner
from reprune.pruning.refinement import Refinement, needs_of
from reprune.sparsity.patterns import Pattern
from reprune.sparsity.schedule import Masks, ReconstructAt


@dataclass(frozen=True)
class PruningPlan:
    """What is pruned how: the method, the pattern, for each round a sparsity by layer ('block.name'), the seed.

    Layers that are not named stay dense. `masks` and `reconstruct` are the schedule's; `gradients` are there where they
    are needed.
    """

    pruner: Pruner
    pattern: Pattern
    rounds: Sequence[Mapping[str, float]]
    seed: int
    masks: Masks = "monotone"
    reconstruct: ReconstructAt = "end"
    refinement: Refinement | None = None
    gradients: ModelGradients | None = None

    @property
    def needs(self) -> Needs:
        """What the method and the refinement read."""
        return needs_of(self.pruner, self.refinement)

    def layers(self, model: LoadedModel, block: int) -> dict[str, LinearView]:
        """The layers of a block that are pruned."""
        views = model.linears[block]
        return {name: view for name, view in views.items() if f"{block}.{name}" in self.rounds[-1]}

    def thinned(self, block: int) -> list[str]:
        """The layers of a block that lose any weight, by name within it."""
        above = f"{block}."
        named = self.rounds[-1].items()
        return [name.removeprefix(above) for name, share in named if share > 0 and name.startswith(above)]
