"""Prune the layers of one block, and fit each of them where the technique asks for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.engine.chains import Boundary, Chains
from reprune.engine.gradients import block_gradients
from reprune.engine.observing import Views, collect, collect_pairs, collect_projected
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.statistics import InputStatistics, collecting
from reprune.engine.units import prune_units
from reprune.errors import RunError
from reprune.model.coupling import Coupling
from reprune.model.linears import LinearView
from reprune.pruning.contract import (
    GradientStatistics,
    LayerContext,
    Pruned,
    ScorePruner,
    UnitPruner,
)
from reprune.pruning.refinement import refined
from reprune.pruning.together import pruned_in_turn
from reprune.reconstruction.pairs import PairStatistics
from reprune.reconstruction.technique import Technique
from reprune.resources import StageMeter
from reprune.seeding import generator
from reprune.sparsity.coupled_units import CoupledUnits

LOG = logging.getLogger("reprune")


@dataclass(frozen=True)
class BlockPruning:
    """One block in one round: what its layers' statistics and least squares are made of.

    `inputs` enter the block in the pruned chain, `dense_inputs` in the dense one; `dense_weights` are the block's
    before it was first pruned, `masks` those of the round before (stored layout).
    """

    plan: PruningPlan
    technique: Technique
    chains: Chains
    texts: Texts
    block: int
    number: int
    inputs: Boundary
    dense_inputs: Boundary
    dense_weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    meter: StageMeter

    @torch.no_grad()
    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Prune the block's layers in place. Returns the keep masks in the stored layout, and rows for the record."""
        model = self.chains.model
        masks: dict[str, Tensor] = {}
        rows: dict[str, Any] = {}
        remaining = self.plan.layers(model, self.block)
        gradients = self._gradients(remaining)
        with model.plan.holding(model.blocks[self.block]):
            while remaining:
                with self.meter.stage("statistics"):
                    group = self._next_group(remaining)
                    statistics = self._statistics(group)
                    refining = self._refining_statistics(group)
                    solving = self._solver_statistics(group, statistics)
                with self.meter.stage("pruning"):
                    layers = {
                        name: self._context(name, view, statistics.get(name), gradients(name))
                        for name, view in group.items()
                    }
                    for name, pruned, seconds in self._chosen(layers, refining):
                        start = time.perf_counter() - seconds
                        masks[name], rows[name] = self._write(
                            layers[name], group[name], pruned, solving.get(name)
                        )
                        rows[name]["seconds"] = round(time.perf_counter() - start, 4)
                        del remaining[name]
        # In the model's order, whatever the order of pruning was.
        order = [name for name in model.linears[self.block] if name in masks]
        return {name: masks[name] for name in order}, {name: rows[name] for name in order}

    def _next_group(self, remaining: Views) -> dict[str, LinearView]:
        """All layers, or those that are computed first: the ones that share the first input."""
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

    def _gradients(self, views: Views) -> Callable[[str], dict[str, GradientStatistics]]:
        """By layer the fields of LayerContext with gradients, of those that are needed."""
        found: dict[str, Mapping[str, GradientStatistics]] = {}
        if self.plan.needs.gradients and views:
            assert self.plan.gradients is not None
            found["gradients"] = self.plan.gradients.of(self.block)
        if self.plan.needs.block_gradients and views:
            with self.meter.stage("gradients"):
                found["block_gradients"] = block_gradients(
                    self.chains, self.block, self._read_chain, self.texts.mask, views
                )
        device = self.chains.model.plan.device
        return lambda name: {kind: by_layer[name].to(device) for kind, by_layer in found.items()}

    @property
    def _read_chain(self) -> Boundary:
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

    def _statistics(self, group: Views) -> dict[str, InputStatistics]:
        """What the pruner reads: of the block as it is now, on the input of the chain that was asked for."""
        needs = self.plan.pruner.needs if self._refines_apart else self.plan.needs
        if not needs.any:
            return {}
        # The solver can go on with a Gram of the same tokens.
        gram = needs.gram or (self._solver_shares_statistics and self._solver_reads_gram)
        return collect(self.chains, self.block, self._read_chain, self._read_texts, group, gram)

    def _refining_statistics(self, group: Views) -> dict[str, InputStatistics]:
        """What the refinement reads, where that is other text than the pruner's: all of the mask data."""
        if not self._refines_apart:
            return {}
        assert self.plan.refinement is not None
        gram = self.plan.refinement.needs.gram
        return collect(self.chains, self.block, self._read_chain, self.texts.mask, group, gram)

    @property
    def _read_texts(self) -> list[TextSet]:
        """The mask data that the pruner's statistics are of."""
        return self.texts.mask_without(self.plan.pruner.needs.statistics_without)

    @property
    def _refines_apart(self) -> bool:
        plan = self.plan
        return (
            plan.refinement is not None
            and plan.refinement.needs.any
            and plan.pruner.needs.statistics_without is not None
        )

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

    def _solver_statistics(
        self, group: Views, statistics: Mapping[str, InputStatistics]
    ) -> dict[str, tuple[InputStatistics, PairStatistics | None]]:
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

    def _context(
        self,
        name: str,
        view: LinearView,
        statistics: InputStatistics | None,
        gradients: Mapping[str, GradientStatistics],
    ) -> LayerContext:
        """A layer as the method sees it."""
        plan = self.plan
        stream = generator(
            plan.seed, "prune", f"{self.block}.{name}", *([self.number] if self.number else [])
        )
        earlier = view.orient(self.masks[name]).to(view.weight.device) if name in self.masks else None
        weight, removed = view.weight, None
        if earlier is not None and plan.masks == "free":
            weight = torch.where(earlier, weight, self._dense(view))
        elif earlier is not None:
            removed = ~earlier
        return LayerContext(name, self.block, weight, statistics, stream, removed, **gradients)

    def _chosen(
        self, layers: Mapping[str, LayerContext], refining: Mapping[str, InputStatistics]
    ) -> Iterator[tuple[str, Pruned, float]]:
        """Each layer pruned, one at a time, and the seconds that took; units of several layers all at once.

        `refining` are statistics for the refinement, of layers where it does not read the pruner's.
        """
        plan, start = self.plan, time.perf_counter()
        shares = {name: plan.rounds[self.number][f"{self.block}.{name}"] for name in layers}
        if isinstance(plan.pattern, CoupledUnits) and plan.pruner.needs.prunes:
            assert isinstance(plan.pruner, ScorePruner | UnitPruner)
            found = prune_units(self.chains.model, plan.pruner, plan.pattern, layers, shares, self._projected)
            each = (time.perf_counter() - start) / max(1, len(found))
            for name, pruned in found.items():
                yield name, pruned, each
            return
        for name, pruned, seconds in pruned_in_turn(plan.pruner, layers, plan.pattern, shares):
            start = time.perf_counter()
            if plan.refinement is not None:
                layer = layers[name]
                judged = replace(layer, statistics=refining.get(name, layer.statistics))
                pruned = refined(plan.refinement, judged, pruned, plan.pattern)
            yield name, pruned, seconds + time.perf_counter() - start

    def _projected(self, couplings: Sequence[Coupling]) -> dict[str, Tensor]:
        return collect_projected(self.chains, self.block, self._read_chain, self.texts.mask, couplings)

    def _write(
        self,
        layer: LayerContext,
        view: LinearView,
        pruned: Pruned,
        solving: tuple[InputStatistics, PairStatistics | None] | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Put a pruned layer into the model, solved where the technique asks for it: its keep mask in the stored layout, its row."""
        plan, name, statistics = self.plan, layer.name, layer.statistics
        place, full = f"block {self.block}, layer {name}", f"{self.block}.{name}"
        if layer.removed is not None and bool((pruned.keep & layer.removed).any()):
            raise RunError(f"{place}: {type(plan.pruner).__name__} brought weights back that an earlier round removed; use schedule.masks=free")  # fmt: skip
        notes = [*pruned.notes, *(statistics.notes if statistics is not None else [])]
        if len(plan.rounds) > 1:
            notes = [f"round {self.number + 1}: {note}" for note in notes]
        for note in notes:
            LOG.warning("%s: %s", place, note)
        row: dict[str, Any] = {
            "planned": plan.rounds[self.number][full],
            "measured": 1 - float(pruned.keep.double().mean()),
            "weights": pruned.keep.numel(),
            "removed": int((~pruned.keep).sum()),
            "notes": notes,
            **({"facts": dict(pruned.facts)} if pruned.facts else {}),
        }
        if statistics is not None:
            row["tokens"] = statistics.num_tokens
        result = pruned.weight
        # What lost nothing is at its optimum, to the bit.
        if solving is not None and not bool(pruned.keep.all()):
            layerwise = self.technique.layerwise
            assert layerwise is not None
            solved = layerwise.solve(self._dense(view), pruned.weight, pruned.keep, *solving, place)
            result, row[layerwise.name] = solved.weight, dict(solved.told)
            for note in solved.told.get("notes", []):
                LOG.warning("%s: %s", place, note)
            if solved.bias_change is not None:
                change = solved.bias_change
                if plan.pattern.units:
                    # What units that went put out is read by nothing.
                    change = change.masked_fill(~pruned.keep.any(dim=1), 0)
                view.write_bias(self.dense_weights[view.bias].to(change.device).float() + change)
        view.write(result)
        self.chains.model.plan.synchronise()
        return view.orient(pruned.keep).cpu().contiguous(), row

    def _dense(self, view: LinearView) -> Tensor:
        """The layer's dense weight [d_out, d_in]."""
        return view.orient(view.of(self.dense_weights[view.parameter])).to(view.weight.device)
