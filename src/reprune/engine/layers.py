"""Prune the layers of one block, and solve their least squares where the technique asks for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.engine.chains import Boundary, Chains
from reprune.engine.gradients import ModelGradients, block_gradients
from reprune.engine.statistics import InputStatistics, collecting
from reprune.errors import RunError
from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import GradientStatistics, LayerContext, Needs, Pruner
from reprune.pruning.refinement import Refinement, needs_of, refined
from reprune.reconstruction.least_squares import PairStatistics
from reprune.reconstruction.technique import Technique
from reprune.resources import StageMeter
from reprune.seeding import generator
from reprune.sparsity.patterns import Pattern
from reprune.sparsity.schedule import Masks, ReconstructAt

LOG = logging.getLogger("reprune")
Views = Mapping[str, LinearView]


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
                    solving = self._solver_statistics(group, statistics)
                with self.meter.stage("pruning"):
                    for name, view in group.items():
                        masks[name], rows[name] = self._prune_layer(
                            name, view, statistics.get(name), solving.get(name), gradients(name)
                        )
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
        if self.plan.needs.gradients:
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
        needs = self.plan.needs
        if not needs.any:
            return {}
        # The solver can go on with a Gram of the same tokens.
        gram = needs.gram or self._solver_shares_statistics
        return collect(self.chains, self.block, self._read_chain, self.texts.mask, group, gram)

    @property
    def _solver_shares_statistics(self) -> bool:
        technique, texts = self.technique, self.texts
        return (
            self._solves
            and technique.statistics_chain == technique.input_chain
            and [text.key for text in texts.mask] == [text.key for text in texts.reconstruction]
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
            own = collect(self.chains, self.block, students, self.texts.reconstruction, group, True)
        if technique.target_chain == "sparse" or technique.solves_on_dense_inputs(self.number):
            return {name: (found, None) for name, found in own.items()}
        leaders = {id(found): name for name, found in reversed(own.items())}
        pairs = self._collect_pairs(students, {name: group[name] for name in leaders.values()})
        return {name: (found, pairs[leaders[id(found)]]) for name, found in own.items()}

    def _collect_pairs(self, students: Boundary, views: Views) -> dict[str, PairStatistics]:
        """Σ x̂ xᵀ of some layers: x̂ in the block as it is on `students`, x in the dense block on the dense chain."""
        model, plan = self.chains.model, self.chains.model.plan
        module = model.blocks[self.block]
        found = {name: PairStatistics() for name in views}
        dense = {name: tensor.to(plan.device) for name, tensor in self.dense_weights.items()}
        for text in self.texts.reconstruction:
            student, teacher = students[text.key], self.dense_inputs[text.key]
            for where in student.batches(plan.sequences_a_pass(student.length)):
                hidden = student.read(where, plan)
                call = model.call(self.block, len(hidden), student.length, student.positions(where))
                with _watching(views) as pruned_inputs:
                    call.run(module, hidden)
                with _watching(views) as dense_inputs:
                    call.run(module, teacher.read(where, plan), weights=dense)
                for name, pair in found.items():
                    pair.add(pruned_inputs[name], dense_inputs[name])
        return found

    def _prune_layer(
        self,
        name: str,
        view: LinearView,
        statistics: InputStatistics | None,
        solving: tuple[InputStatistics, PairStatistics | None] | None,
        gradients: Mapping[str, GradientStatistics],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Prune one layer in place: its keep mask in the stored layout, its row."""
        plan, full = self.plan, f"{self.block}.{name}"
        place = f"block {self.block}, layer {name}"
        stream = generator(plan.seed, "prune", full, *([self.number] if self.number else []))
        start = time.perf_counter()
        earlier = view.orient(self.masks[name]).to(view.weight.device) if name in self.masks else None
        weight, removed = view.weight, None
        if earlier is not None and plan.masks == "free":
            weight = torch.where(earlier, weight, self._dense(view))
        elif earlier is not None:
            removed = ~earlier
        context = LayerContext(name, self.block, weight, statistics, stream, removed, **gradients)
        pruned = plan.pruner.prune(context, plan.pattern, plan.rounds[self.number][full])
        if plan.refinement is not None:
            pruned = refined(plan.refinement, context, pruned, plan.pattern)
        if removed is not None and bool((pruned.keep & removed).any()):
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
            assert self.technique.layerwise is not None
            result, row["least_squares"] = self.technique.layerwise.solve(
                self._dense(view), pruned.weight, pruned.keep, *solving, place
            )
            for note in row["least_squares"].get("notes", []):
                LOG.warning("%s: %s", place, note)
        view.write(result)
        self.chains.model.plan.synchronise()
        row["seconds"] = round(time.perf_counter() - start, 4)
        return view.orient(pruned.keep).cpu().contiguous(), row

    def _dense(self, view: LinearView) -> Tensor:
        """The layer's dense weight [d_out, d_in]."""
        return view.orient(view.of(self.dense_weights[view.parameter])).to(view.weight.device)


def collect(
    chains: Chains, block: int, inputs: Boundary, texts: Sequence[TextSet], views: Views, with_gram: bool
) -> dict[str, InputStatistics]:
    """Input statistics of some layers of a block, whose weights are as they are now. RunError for a layer not called."""
    with chains.model.plan.holding(chains.model.blocks[block]), collecting(views, with_gram) as found:
        chains.observe(block, inputs, texts)
    missed = [name for name in views if name not in found]
    if missed:
        raise RunError(
            f"block {block}, layer {missed[0]}: it was not called in the forward pass, so it has no statistics"
        )
    return found


@contextmanager
def _watching(views: Views) -> Iterator[dict[str, Tensor]]:
    """What each layer was given in the one forward pass of the context."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen[name] = positional[0] if positional else next(iter(keywords.values()))

        return keep

    handles = [
        view.module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, view in views.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
