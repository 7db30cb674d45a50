"""The dense and the pruned chain of activations, advanced block by block over every text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from reprune.calibration.source import TextSet
from reprune.engine.activations import Activations, Stores
from reprune.model.loading import LoadedModel
from reprune.model.packing import check_texts_apart
from reprune.ranks import ALONE, Ranks

Boundary = dict[str, Activations]
"""One boundary between blocks: a store for each text, by the text's key."""


class Chains:
    """`dense[i]` is x̄_i, what enters block i in the dense model; `pruned` is x_a at the first open boundary a."""

    def __init__(self, model: LoadedModel, texts: Sequence[TextSet], stores: Stores) -> None:
        self.model = model
        self.texts = texts
        self.stores = stores
        embedded = self._embed()
        self.dense: dict[int, Boundary] = {0: embedded}
        self.pruned: Boundary = embedded

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work: each computes a part of every text's sequences."""
        return self.model.plan.ranks

    def apart(self) -> Chains:
        """What is there of both chains, in the hands of this process alone: it reads all sequences, and exchanges nothing."""
        found = copy(self)
        found.model = replace(self.model, plan=replace(self.model.plan, ranks=ALONE))
        found.stores = self.stores.apart()
        return found

    def batches(self, store: Activations) -> Iterator[slice]:
        """This process's sequences, as many at once as go through a block."""
        return store.batches(self.model.plan.sequences_a_pass(store.length), self.ranks.share(len(store)))

    def _embed(self) -> Boundary:
        embedded = {}
        if any(text.positions_NT is not None for text in self.texts):
            check_texts_apart(self.model)
        for text in self.texts:
            count, length = text.tokens_NT.shape
            store = self.stores.new(count, length, text.positions_NT)
            for where in self.batches(store):
                store.write(where, self.model.embed(text.tokens_NT[where], store.positions(where)))
            embedded[text.key] = store
        self.ranks.wait()
        return embedded

    @torch.no_grad()
    def through(
        self,
        block: int,
        inputs: Boundary,
        only: Sequence[TextSet] | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        until: str | None = None,
    ) -> Boundary:
        """The outputs of a block for all texts or some of them.

        Its weights are as they are now, but for `weights`, which stand in for those of these names. `until` asks for the
        output of a module within the block, which must be as wide as the block's.
        """
        model, plan = self.model, self.model.plan
        outputs = {}
        with model.holding(model.blocks[block]):
            standing_in = {name: tensor.to(plan.device) for name, tensor in (weights or {}).items()}
            for text in self.texts if only is None else only:
                source = inputs[text.key]
                store = self.stores.new(len(source), source.length, source.positions_NT)
                for where in self.batches(source):
                    hidden = source.read(where, plan)
                    call = model.call(block, len(hidden), source.length, source.positions(where))
                    store.write(
                        where, call.run(model.blocks[block], hidden, weights=standing_in, until=until)
                    )
                outputs[text.key] = store
        self.ranks.wait()
        return outputs

    @torch.no_grad()
    def observe(
        self,
        block: int,
        inputs: Boundary,
        only: Sequence[TextSet],
        at_most: int | None = None,
        *,
        last: nn.Module | None = None,
    ) -> None:
        """Run a block for the sake of its hooks, on all batches of a text or `at_most` so many; the outputs are not kept.

        Each process runs its share of all batches; with `at_most` every one runs the same. With `last`, a module within
        the block, nothing is computed from it on.
        """
        model, plan = self.model, self.model.plan
        for text in only:
            source = inputs[text.key]
            every = source.batches(plan.sequences_a_pass(source.length))
            for where in self.batches(source) if at_most is None else islice(every, at_most):
                hidden = source.read(where, plan)
                call = model.call(block, len(hidden), source.length, source.positions(where))
                if last is None:
                    call.run(model.blocks[block], hidden)
                else:
                    call.run_up_to(model.blocks[block], hidden, last)

    def advance_dense(self, block: int) -> None:
        """x̄_{i+1} from x̄_i; the block must still have its dense weights."""
        self.dense[block + 1] = self.through(block, self.dense[block])

    def forget_dense(self, before: int) -> None:
        """Drop the dense boundaries below `before`."""
        for boundary in [boundary for boundary in self.dense if boundary < before]:
            del self.dense[boundary]


def dense_copy(model: LoadedModel, block: int) -> Mapping[str, Tensor]:
    """A copy of a block's parameters."""
    with model.resident(model.blocks[block]):
        return {name: tensor.detach().clone() for name, tensor in model.blocks[block].named_parameters()}
