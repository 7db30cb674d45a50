"""Prune the layers of one block, and fit each of them where the technique asks for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reprune.calibration.roles import Texts
from reprune.engine.chains import Boundary, Chains
from reprune.engine.gradients import block_gradients
from reprune.engine.layer_statistics import LayerStatistics, Solving
from reprune.engine.observing import Views
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.statistics import InputStatistics
from reprune.engine.units import prune_units
from reprune.errors import RunError
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
        gradients, reading = self._gradients(remaining), self._reading
        with model.holding(model.blocks[self.block]):
            while remaining:
                with self.meter.stage("statistics"):
                    group = reading.next_group(remaining)
                    statistics = reading.of_pruner(group)
                    refining = reading.of_refinement(group)
                    solving = reading.of_solver(group, statistics)
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
            model.plan.ranks.same_([*model.blocks[self.block].parameters(), *masks.values()])
        # In the model's order, whatever the order of pruning was.
        order = [name for name in model.linears[self.block] if name in masks]
        return {name: masks[name] for name in order}, {name: rows[name] for name in order}

    @property
    def _reading(self) -> LayerStatistics:
        return LayerStatistics(
            plan=self.plan,
            technique=self.technique,
            chains=self.chains,
            texts=self.texts,
            block=self.block,
            number=self.number,
            inputs=self.inputs,
            dense_inputs=self.dense_inputs,
            dense_weights=self.dense_weights,
        )

    def _gradients(self, views: Views) -> Callable[[str], dict[str, GradientStatistics]]:
        """By layer the fields of LayerContext with gradients, of those that are needed."""
        found: dict[str, Mapping[str, GradientStatistics]] = {}
        if self.plan.needs.gradients and views:
            assert self.plan.gradients is not None
            found["gradients"] = self.plan.gradients.of(self.block)
        if self.plan.needs.block_gradients and views:
            with self.meter.stage("gradients"):
                found["block_gradients"] = block_gradients(
                    self.chains, self.block, self._reading.read_chain, self.texts.mask, views
                )
        device = self.chains.model.plan.device
        return lambda name: {kind: by_layer[name].to(device) for kind, by_layer in found.items()}

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
            found = prune_units(
                self.chains.model, plan.pruner, plan.pattern, layers, shares, self._reading.projected
            )
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

    def _write(
        self,
        layer: LayerContext,
        view: LinearView,
        pruned: Pruned,
        solving: Solving | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Put a pruned layer into the model, solved where the technique asks for it: its keep mask in the stored layout, its row."""
        plan, name, statistics = self.plan, layer.name, layer.statistics
        place, full = f"block {self.block}, layer {name}", f"{self.block}.{name}"
        if layer.removed is not None and bool((pruned.keep & layer.removed).any()):
            raise RunError(f"{place}: {type(plan.pruner).__name__} brought weights back that an earlier round removed; use schedule.masks=free")  # fmt: skip
        notes = [*pruned.notes, *(statistics.notes if statistics is not None else [])]
        if len(plan.rounds) > 1:
            notes = [f"round {self.number + 1}: {note}" for note in notes]
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
            if solved.bias_change is not None:
                change = solved.bias_change
                if plan.pattern.units:
                    # What units that went put out is read by nothing.
                    change = change.masked_fill(~pruned.keep.any(dim=1), 0)
                view.write_bias(self.dense_weights[view.bias].to(change.device).float() + change)
        view.write(result)
        say_notes(self.block, {name: row})
        self.chains.model.plan.synchronise()
        return view.orient(pruned.keep).cpu().contiguous(), row

    def _dense(self, view: LinearView) -> Tensor:
        """The layer's dense weight [d_out, d_in]."""
        return view.orient(view.of(self.dense_weights[view.parameter])).to(view.weight.device)


def say_notes(block: int, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn of what was noted in rows of the record, of layers by name."""
    for name, row in layers.items():
        parts = [row, *(part for part in row.values() if isinstance(part, Mapping))]
        for note in [note for part in parts for note in part.get("notes", [])]:
            LOG.warning("block %d, layer %s: %s", block, name, note)
