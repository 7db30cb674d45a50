"""Which statistics the layers of one block are pruned, refined and solved by: of which text, in which chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.engine.chains import Boundary, Chains
from reprune.engine.collecting import collecting
from reprune.engine.observing import Views, collect, collect_pairs, collect_projected
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.statistics import InputStatistics
from reprune.model.coupling import Coupling
from reprune.model.linears import LinearView
from reprune.pruning.refinement import reads_apart
from reprune.reconstruction.pairs import PairStatistics
from reprune.reconstruction.technique import Technique

Solving = tuple[InputStatistics, PairStatistics | None]
"""A layer's inputs on the reconstruction text, and their products with the dense chain's where that is the target."""


@dataclass(frozen=True)
class LayerStatistics:
    """Takes the statistics of one block in one round. The fields are those of BlockPruning."""

    plan: PruningPlan
    technique: Technique
    chains: Chains
    texts: Texts
    block: int
    number: int
    inputs: Boundary
    dense_inputs: Boundary
    dense_weights: Mapping[str, Tensor]

    def next_group(self, remaining: Views) -> dict[str, LinearView]:
        """All of `remaining`, or those that are computed first: the ones that share the first input."""
        if self.technique.within_block == "together" or not self._reads_inputs:
            return dict(remaining)
        with collecting(remaining, with_gram=False) as found:
            self.chains.observe(self.block, self.inputs, self.texts.mask[:1], at_most=1)
        first = next((name for name in found if name in remaining), None)
        if first is None:
            # None of them is called: `collect` says so.
            return dict(remaining)
        stage = remaining[first].stage
        return {
            name: view
            for name, view in remaining.items()
            if view.stage == stage or (name in found and found[name] is found[first])
        }

    @property
    def read_chain(self) -> Boundary:
        """What enters the block where the pruner's statistics are taken."""
        return self.inputs if self.technique.statistics_chain == "sparse" else self.dense_inputs

    @property
    def _reads_inputs(self) -> bool:
        return self.plan.needs.any or self._solves

    @property
    def _solves(self) -> bool:
        """Whether this round's layers are solved: those of each round, or of the last, as the schedule says."""
        last = self.number == len(self.plan.rounds) - 1
        return self.technique.layerwise is not None and (last or self.plan.reconstruct == "each_round")

    def of_pruner(self, group: Views) -> dict[str, InputStatistics]:
        """What the pruner reads: of the block as it is now, on the input of the chain that was asked for."""
        needs = self.plan.pruner.needs if self._refines_apart else self.plan.needs
        if not needs.any:
            return {}
        # The solver can go on with a Gram of the same tokens.
        gram = needs.gram or (self._solver_shares_statistics and self._solver_reads_gram)
        return collect(self.chains, self.block, self.read_chain, self._read_texts, group, gram)

    def of_refinement(self, group: Views) -> dict[str, InputStatistics]:
        """What the refinement reads, where that is other text than the pruner's: all of the mask data."""
        if not self._refines_apart:
            return {}
        assert self.plan.refinement is not None
        gram = self.plan.refinement.needs.gram
        return collect(self.chains, self.block, self.read_chain, self.texts.mask, group, gram)

    @property
    def _read_texts(self) -> list[TextSet]:
        """The mask data that the pruner's statistics are of."""
        return self.texts.mask_without(self.plan.pruner.needs.statistics_without)

    @property
    def _refines_apart(self) -> bool:
        return reads_apart(self.plan.pruner, self.plan.refinement)

    @property
    def _solver_reads_gram(self) -> bool:
        return self.technique.layerwise is not None and self.technique.layerwise.reads_gram

    @property
    def _solver_shares_statistics(self) -> bool:
        technique, solved = self.technique, self.texts.reconstruction
        return (
            self._solves
            and technique.statistics_chain == technique.input_chain
            and [text.key for text in self._read_texts] == [text.key for text in solved]
        )

    def of_solver(self, group: Views, statistics: Mapping[str, InputStatistics]) -> dict[str, Solving]:
        """Inputs of the reconstruction text by layer, and their products with the dense chain's where it is the target."""
        technique = self.technique
        if not self._solves:
            return {}
        own = dict(statistics)
        students = self.inputs if technique.input_chain == "sparse" else self.dense_inputs
        if not (self._solver_shares_statistics and statistics):
            gram = self._solver_reads_gram
            own = collect(self.chains, self.block, students, self.texts.reconstruction, group, gram)
        layerwise = technique.layerwise
        own_target = technique.target_chain == "sparse" or not (layerwise and layerwise.paired)
        if own_target or technique.solves_on_dense_inputs(self.number):
            return {name: (found, None) for name, found in own.items()}
        leaders = {id(found): name for name, found in reversed(own.items())}
        views = {name: group[name] for name in leaders.values()}
        pairs = collect_pairs(
            self.chains,
            self.block,
            students,
            self.dense_inputs,
            self.dense_weights,
            self.texts.reconstruction,
            views,
        )
        return {name: (found, pairs[leaders[id(found)]]) for name, found in own.items()}

    def projected(self, couplings: Sequence[Coupling]) -> dict[str, Tensor]:
        """What units give to the output of their consumers, on all of the mask data; see `collect_projected`."""
        return collect_projected(self.chains, self.block, self.read_chain, self.texts.mask, couplings)
