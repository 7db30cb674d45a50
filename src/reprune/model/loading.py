"""LoadedModel: model, tokenizer, blocks and device plan in one object; nothing else knows an architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reprune.errors import RunError
from reprune.model.blocks import (
    BlockCall,
    Wraps,
    find_blocks,
    passing_on,
    placed,
    record_calls,
    same_calls,
)
from reprune.model.checkpoint import ModelSource, read_weights
from reprune.model.description import num_blocks
from reprune.model.device import DevicePlan
from reprune.model.disk_weights import DiskWeights
from reprune.model.documents import documents_apart
from reprune.model.hollow import open_checkpoint
from reprune.model.linears import LinearView, linears_of
from reprune.model.submodules import Submodule, find_submodules, is_added
from reprune.model.trimming import Trimmed

_TRACED_TOKENS = 4


@dataclass(eq=False)
class LoadedModel:
    """A causal language model, its blocks, its tokenizer and where it computes.

    Its weights are in host memory; with `on_disk`, those of its blocks only within `holding` or `resident`.
    `dense_numbers` are those that its blocks have in the dense model, where blocks were dropped; `trimmed` says which
    rows of its vocabulary are there, where some were taken out.
    """

    name: str
    model: Any
    tokenizer: Any
    blocks: nn.ModuleList
    plan: DevicePlan
    identity: dict[str, Any]
    dense_numbers: Sequence[int] | None = field(default=None, kw_only=True)
    trimmed: Trimmed | None = field(default=None, kw_only=True)
    on_disk: DiskWeights | None = field(default=None, kw_only=True)
    _calls: dict[tuple[int, int], list[BlockCall]] = field(default_factory=dict)
    _placed: tuple[Tensor, list[BlockCall]] | None = None
    _wraps: Wraps = field(default_factory=dict)
    _submodules: dict[int, list[Submodule]] = field(default_factory=dict)
    _added_last: dict[int, LinearView | None] = field(default_factory=dict)

    @property
    def wraps(self) -> Wraps:
        """What its blocks return behind the hidden states; known once `embed` was called."""
        return self._wraps

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        assert isinstance(base, nn.Module)
        return base

    @cached_property
    def linears(self) -> list[dict[str, LinearView]]:
        """The prunable linears of each block, by name within the block."""
        return [linears_of(block) for block in self.blocks]

    @contextmanager
    def holding(self, *modules: nn.Module) -> Iterator[None]:
        """Keep modules on the device for the context; those that are there already stay afterwards.

        Where blocks rest on disk, those among `modules` are read; within larger ones each is there while it computes.
        """
        around = any(inside is self.blocks for module in modules for inside in module.modules())
        if self.on_disk is None or not around:
            own = [module for module in modules if module in set(self.blocks)]
            with self.resident(*own), self.plan.holding(*modules):
                yield
            return
        inside = {id(module) for module in self.blocks.modules()}
        leaves = [
            leaf
            for module in modules
            for leaf in module.modules()
            if id(leaf) not in inside and not any(leaf.children())
        ]
        with self.on_disk.in_turn(list(self.blocks), self.holding), self.plan.holding(*leaves):
            yield

    @contextmanager
    def resident(self, *blocks: nn.Module) -> Iterator[None]:
        """Have blocks in host memory for the context, where they rest on disk."""
        with nullcontext() if self.on_disk is None else self.on_disk.resident(blocks):
            yield

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Let the whole model compute in host memory, where blocks rest on disk one at a time."""
        blocks = list(self.blocks)
        with nullcontext() if self.on_disk is None else self.on_disk.in_turn(blocks, self.resident):
            yield

    def submodules(self, block: int) -> list[Submodule]:
        """Attention, MLP or whatever a block adds to its residual stream, in the order in which they are computed."""
        if block not in self._submodules:
            # Any tokens will do: only what is called with what is looked at.
            hidden = self.embed(torch.zeros(1, _TRACED_TOKENS, dtype=torch.long))
            call = self.call(block, 1, _TRACED_TOKENS)
            with self.holding(self.blocks[block]):
                self._submodules[block] = find_submodules(
                    self.blocks[block], self.linears[block], call, hidden.to(self.plan.device)
                )
        return self._submodules[block]

    def added_last(self, block: int) -> LinearView:
        """The prunable layer whose output a block adds last to its residual stream. RunError where there is none."""
        if block not in self._added_last:
            with self.resident(self.blocks[block]):
                self._added_last[block] = self._find_added_last(block)
        found = self._added_last[block]
        if found is None:
            raise RunError(
                f"block {block}: no layer's output is added to the residual stream as it is (a norm, a factor or a router "
                "stands between), so that no least squares of a layer are those of the window; set "
                "reconstruction.last_layer_iterations=0"
            )
        return found

    def _find_added_last(self, block: int) -> LinearView | None:
        view = self.linears[block].get(self.submodules(block)[-1].output)
        if view is None:
            return None
        hidden = self.embed(torch.zeros(1, _TRACED_TOKENS, dtype=torch.long)).to(self.plan.device)
        with self.holding(self.blocks[block]):
            added = is_added(self.blocks[block], view.name, self.call(block, 1, _TRACED_TOKENS), hidden)
        return view if added else None

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """What enters block 0 for token ids [batch, tokens]: [batch, tokens, hidden], on the host."""
        hidden, calls = record_calls(
            self.base, self.blocks, tokens_BT, positions_BT, self._wraps, self.resident
        )
        if positions_BT is None:
            known = self._calls.setdefault((tokens_BT.shape[0], tokens_BT.shape[1]), calls)
        else:
            known = self._recorded(tokens_BT.shape, positions_BT)
        if not same_calls(known, calls):
            raise RunError(
                f"{self.name}: the arguments of its blocks depend on the tokens, which block-by-block replay "
                "cannot give them; this model is not supported"
            )
        return hidden

    @torch.no_grad()
    def _recorded(self, shape: torch.Size, positions_BT: Tensor | None) -> list[BlockCall]:
        """The calls of all blocks for a batch of that shape: by shape where each row is one text, else by positions."""
        batch, length = shape
        if positions_BT is None and (batch, length) in self._calls:
            return self._calls[batch, length]
        # Masks of packed texts are as large as attention: only those of the batch at hand are kept.
        if (
            positions_BT is not None
            and self._placed is not None
            and torch.equal(self._placed[0], positions_BT)
        ):
            return self._placed[1]
        any_tokens = torch.zeros(shape, dtype=torch.long)
        _, calls = record_calls(self.base, self.blocks, any_tokens, positions_BT, self._wraps, self.resident)
        if positions_BT is None:
            self._calls[batch, length] = calls
        else:
            self._placed = positions_BT, calls
        return calls

    def call(self, block: int, batch: int, length: int, positions_BT: Tensor | None = None) -> BlockCall:
        """How block `block` is called for a batch of that size and length, arguments on the device.

        `positions_BT`, on the host, begin anew at each text of a row; None where each row is one text.
        """
        recorded = self._recorded(torch.Size((batch, length)), positions_BT)[block]
        put = self.plan.put
        positional, keywords = put(recorded.positional), put(recorded.keywords)
        assert isinstance(positional, tuple)
        assert isinstance(keywords, dict)
        return BlockCall(positional, keywords)

    @cached_property
    def blocks_path(self) -> str:
        """Where the list of blocks lies in the model."""
        return str(next(name for name, module in self.model.named_modules() if module is self.blocks))

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Logits [batch, tokens, vocabulary] on the device; the caller holds the model there."""
        return self.differentiable_logits(tokens_BT, {}, positions_BT)

    def differentiable_logits(
        self, tokens_BT: Tensor, weights: Mapping[str, Tensor], positions_BT: Tensor | None = None
    ) -> Tensor:
        """As `logits`, with gradients; `weights` stand in for the model's own tensors of these names."""
        keywords: dict[str, Any] = {"input_ids": tokens_BT.to(self.plan.device), "use_cache": False}
        if positions_BT is not None:
            positions_BT = positions_BT.to(self.plan.device)
            keywords |= placed(self.model, positions_BT)
        with documents_apart(self.blocks, positions_BT):
            output = (
                functional_call(self.model, dict(weights), (), keywords)
                if weights
                else self.model(**keywords)
            )
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    @property
    def outside_blocks(self) -> list[nn.Module]:
        """The modules without children that lie outside the blocks: embeddings, norms, the head."""
        inside = {id(module) for module in self.blocks.modules()}
        every = self.model.modules()
        return [module for module in every if id(module) not in inside and not any(module.children())]

    def logits_behind_blocks(
        self, tokens_BT: Tensor, states_BTH: Tensor, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] of what the last block puts out, with gradients; no block runs.

        The caller holds `outside_blocks` on the device.
        """
        assert self._wraps, (
            "blocks are recorded first, by `embed`, which tells what they return behind the hidden states"
        )
        with passing_on(self.blocks, states_BTH, self._wraps):
            return self.differentiable_logits(tokens_BT, {}, positions_BT)

    def with_model(self, model: Any) -> LoadedModel:
        """Another model of the same kind, with blocks of other sizes, in this one's place."""
        assert self.on_disk is None, "another model has its weights in memory"
        blocks = model.get_submodule(self.blocks_path)
        return LoadedModel(self.name, model, self.tokenizer, blocks, self.plan, self.identity)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer so that plain transformers loads them."""
        if self.on_disk is None:
            self.model.save_pretrained(folder)
        else:
            self.on_disk.save(self.model, self.blocks, self.blocks_path, folder)
        self.tokenizer.save_pretrained(folder)


def load_model(
    source: ModelSource, tokenizer: Any, plan: DevicePlan, *, on_disk: bool = False
) -> LoadedModel:
    """Load the weights in the plan's dtype, ready for evaluation: into host memory, or `on_disk` all but the blocks'.

    RunError where weights are missing; ConfigError for a model whose blocks cannot be read one at a time.
    """
    if on_disk:
        checkpoint, model = open_checkpoint(source, plan.dtype)
        blocks = find_blocks(model, num_blocks(model.config), source.blocks_path)
        weights = DiskWeights(checkpoint)
        weights.of(list(blocks))
        return LoadedModel(source.name, model, tokenizer, blocks, plan, source.identity(), on_disk=weights)
    model = read_weights(source.folder(), plan.dtype, source.trust_remote_code)
    blocks = find_blocks(model, num_blocks(model.config), source.blocks_path)
    return LoadedModel(source.name, model, tokenizer, blocks, plan, source.identity())
