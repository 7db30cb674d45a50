"""The dense model visited block by block, for allocations that read its weights and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reprune.calibration.roles import Texts
from reprune.engine.activations import Stores, compare
from reprune.engine.chains import Chains
from reprune.engine.gradients import ModelGradients
from reprune.engine.observing import collect
from reprune.engine.statistics import InputStatistics
from reprune.engine.units import couplings_of
from reprune.errors import RunError
from reprune.model.coupling import Coupling
from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import LayerContext, Pruner
from reprune.seeding import generator
from reprune.sparsity.allocation import DenseBlock, Layers
from reprune.sparsity.patterns import Pattern


@dataclass(frozen=True)
class DensePass:
    """A ModelView of a model that is dense still; the validation text is the run's, all of them together."""

    model: LoadedModel
    texts: Texts
    layers: Layers
    pruner: Pruner
    pattern: Pattern
    stores: Stores
    seed: int
    gradients: ModelGradients | None = None

    @torch.no_grad()
    def visit(
        self, *, norm: bool = False, gram: bool = False, text: bool = True, without: str | None = None
    ) -> Iterator[DenseBlock]:
        """See ModelView."""
        assert text or not (norm or gram)
        texts = [*self.texts.mask, *self.texts.validation]
        chains = Chains(self.model, texts, self.stores) if text else None
        for block in range(len(self.model.blocks)):
            views = {
                f"{block}.{name}": view
                for name, view in self.model.linears[block].items()
                if f"{block}.{name}" in self.layers.shapes
            }
            statistics: dict[str, InputStatistics] = {}
            with self.model.holding(self.model.blocks[block]):
                if chains is not None:
                    if views and (norm or gram):
                        statistics = collect(
                            chains, block, chains.dense[block], self.texts.mask_without(without), views, gram
                        )
                    chains.advance_dense(block)
                yield _Visited(self, chains, block, views, statistics)
            if chains is not None:
                chains.forget_dense(block + 1)


@dataclass(frozen=True)
class _Visited:
    """See DenseBlock."""

    view: DensePass
    chains: Chains | None
    index: int
    views: Mapping[str, LinearView]
    statistics: Mapping[str, InputStatistics]

    @cached_property
    def layers(self) -> Mapping[str, LayerContext]:
        gradients = (
            {} if self.view.gradients is None or not self.views else self.view.gradients.of(self.index)
        )
        device = self.view.model.plan.device
        return {
            name: LayerContext(
                name.partition(".")[2],
                self.index,
                view.weight,
                self.statistics.get(name),
                generator(self.view.seed, "allocation", name),
                gradients=gradients[name.partition(".")[2]].to(device) if gradients else None,
            )
            for name, view in self.views.items()
        }

    @property
    def couplings(self) -> Sequence[Coupling]:
        names = [name.partition(".")[2] for name in self.views]
        return couplings_of(self.view.model, self.index, names) if names else []

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.chains is not None
        for text in self.view.texts.mask:
            entering = self.chains.dense[self.index][text.key].states_NTH
            leaving = self.chains.dense[self.index + 1][text.key].states_NTH
            for one, other in zip(entering, leaving, strict=True):
                yield one.float(), other.float()

    def error(self, weights: Mapping[str, Tensor]) -> float:
        assert self.chains is not None
        texts = self.view.texts.validation
        replaced = dict[str, Tensor]()
        for name, weight in weights.items():
            view = self.views[name]
            whole = replaced.get(view.parameter)
            if whole is None:
                whole = self.view.model.blocks[self.index].get_parameter(view.parameter).detach().clone()
                replaced[view.parameter] = whole
            view.of(whole).copy_(view.orient(weight))
        outputs = self.chains.through(self.index, self.chains.dense[self.index], texts, weights=replaced)
        found = [
            (
                compare(
                    self.chains.dense[self.index + 1][text.key], outputs[text.key], self.view.model.plan.ranks
                ),
                text.tokens_NT.numel(),
            )
            for text in texts
        ]
        error = sum(errors["relative"] * count for errors, count in found) / sum(count for _, count in found)
        if not torch.isfinite(torch.tensor(error)):
            raise RunError(
                f"block {self.index}: its output on the validation text is not finite; try dtype=float32"
            )
        return error
