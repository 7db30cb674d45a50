"""One training of a window: which inputs, which targets, which parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.engine.chains import Boundary, Chains
from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel
from reprune.model.submodules import Submodule
from reprune.reconstruction.gradient import in_float32, train
from reprune.reconstruction.last_layer import solve_last_layer
from reprune.reconstruction.objective import LanguageObjective, Objective, Pairs, WindowObjective
from reprune.reconstruction.technique import LANGUAGE, Technique
from reprune.reconstruction.trainable import TrainedBlock, choose
from reprune.seeding import generator


@dataclass(frozen=True)
class Fit:
    """Blocks [first, stop) that are trained together, or one submodule of a block.

    `masks` are the keep masks by block and layer (stored layout), `dense_weights` the parameters of blocks before they
    were pruned; `purpose` names the random stream of the order of samples; `thinned` are the layers of the first block
    that lost weights.
    """

    chains: Chains
    texts: Texts
    technique: Technique
    blocks: range
    masks: Mapping[int, Mapping[str, Tensor]]
    dense_weights: Mapping[int, Mapping[str, Tensor]]
    seed: int
    purpose: tuple[int, ...]
    on_step: Callable[[], None]
    thinned: Sequence[str]
    submodule: Submodule | None = None

    def run(self) -> dict[str, Any]:
        """Train, and return what to record. RunError, naming the blocks, when the loss is not finite."""
        start = time.perf_counter()
        model, technique = self.chains.model, self.technique
        objective = self._objective(self.texts.reconstruction)
        stopping = [text for text in self.texts.validation if text.name == technique.stop_on]
        validation = self._objective(stopping) if stopping else None
        whole = technique.loss == LANGUAGE
        modules: list[nn.Module] = [model.model] if whole else [model.blocks[block] for block in self.blocks]
        name = "" if self.submodule is None else self.submodule.name
        order = generator(self.seed, "reconstruction", *self.purpose, *([name] if name else []))
        # Before the window is in float32: it is looked for with what the run computes in.
        view = model.added_last(self.blocks.stop - 1) if technique.last_layer_iterations else None
        with in_float32(model, modules):
            trained, ranks = self._trained(), self.chains.ranks
            course = train(
                objective, validation, trained, technique, order, self.on_step, self._place(), ranks
            )
            last: dict[str, Any] = {}
            if view is not None:
                assert isinstance(objective, WindowObjective)
                last = {"last_layer": self._solve_last(objective, view)}
            # Steps are the same everywhere but for the last bits of what computed them.
            ranks.same_(parameter for block in trained for parameter in block.parameters.values())
        told = {"submodule": name} if name else {}
        return {**told, **course.told(), **last, "seconds": round(time.perf_counter() - start, 3)}

    def _solve_last(self, objective: WindowObjective, view: LinearView) -> dict[str, Any]:
        """Least squares of the layer that the window puts out by; what to record of it."""
        keep = self.masks[self.blocks.stop - 1].get(view.name)
        whole = torch.ones_like(view.stored, dtype=torch.bool) if keep is None else keep
        found = solve_last_layer(
            objective,
            view,
            view.orient(whole).to(view.stored.device),
            self.technique.last_layer_iterations,
            self.technique.batch_size,
            self.chains.ranks,
            self._place(),
        )
        self.chains.ranks.same_([view.stored])
        return found

    def _trained(self) -> list[TrainedBlock]:
        model = self.chains.model
        below = None if self.submodule is None else self.submodule.modules
        return [
            choose(
                block,
                model.blocks[block],
                model.linears[block],
                self.masks[block],
                self.technique.trainable,
                below,
            )
            for block in self.blocks
        ]

    def _objective(self, texts: Sequence[TextSet]) -> Objective:
        technique, model = self.technique, self.chains.model
        if technique.loss == LANGUAGE:
            return LanguageObjective.of(model, texts)
        inputs = self._inputs()
        targets = self._targets(texts)
        pairs = Pairs([inputs[text.key] for text in texts], [targets[text.key] for text in texts])
        return WindowObjective(model, self.blocks, pairs, technique.loss, technique.token_weight, self._until)

    @property
    def _until(self) -> str | None:
        return None if self.submodule is None else self.submodule.output

    def _inputs(self) -> Boundary:
        sparse = self.technique.input_chain == "sparse"
        return self.chains.pruned if sparse else self.chains.dense[self.blocks.start]

    def _targets(self, texts: Sequence[TextSet]) -> Boundary:
        """g(w̄; x̄) of the dense chain, or g(w̄; x), the dense window on the pruned chain's input."""
        first, dense_chain = self.blocks.start, self.technique.target_chain == "dense"
        if self.submodule is not None:
            return self._submodule_targets(texts, self.submodule, dense_chain)
        if dense_chain:
            return self.chains.dense[self.blocks.stop]
        states = self.chains.pruned
        for block in range(first, self.blocks.stop):
            states = self.chains.through(block, states, texts, weights=self.dense_weights[block])
        return states

    def _submodule_targets(
        self, texts: Sequence[TextSet], submodule: Submodule, dense_chain: bool
    ) -> Boundary:
        block = self.blocks.start
        weights = dict(self.dense_weights[block])
        if dense_chain:
            source = self.chains.dense[block]
        else:
            source = self.chains.pruned
            # Its own input is that of the block as it is now: only the submodule itself is dense.
            below = tuple(f"{path}." for path in submodule.modules)
            weights = {name: tensor for name, tensor in weights.items() if name.startswith(below)}
        return self.chains.through(block, source, texts, weights=weights, until=submodule.output)

    def _place(self) -> str:
        blocks = self.blocks
        if len(blocks) > 1:
            return f"blocks {blocks.start}–{blocks.stop - 1}"
        return f"block {blocks.start}" + (f", {self.submodule.name}" if self.submodule else "")


def submodules_of(model: LoadedModel, block: int, layers: Sequence[str]) -> list[Submodule]:
    """The submodules of a block in which one of `layers` lies."""
    return [
        submodule
        for submodule in model.submodules(block)
        if any(
            layer == path or layer.startswith(f"{path}.") for path in submodule.modules for layer in layers
        )
    ]


def fits_of(fit: Fit) -> Iterator[Fit]:
    """The window itself, or with `granularity: submodule` those parts of its one block that lost weights."""
    if fit.technique.granularity == "block":
        yield fit
        return
    [block] = fit.blocks
    for submodule in submodules_of(fit.chains.model, block, fit.thinned):
        yield replace(fit, submodule=submodule)
