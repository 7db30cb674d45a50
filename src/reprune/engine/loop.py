"""The block loop: prune what enters a window, reconstruct the window, freeze what leaves it, write it down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.engine.activations import Stores, compare
from reprune.engine.chains import Boundary, Chains, dense_copy
from reprune.engine.layers import PruningPlan, collect, prune_block
from reprune.engine.state import Progress, RunState
from reprune.engine.windows import BlockWindow, windows_over
from reprune.errors import RunError
from reprune.model.loading import LoadedModel
from reprune.reconstruction.gradient import Pairs, reconstruct
from reprune.reconstruction.technique import Technique
from reprune.resources import StageMeter
from reprune.seeding import generator


class Listener(Protocol):
    """Who is told how the loop gets on."""

    def window(self, window: BlockWindow, num_blocks: int, steps: int) -> None:
        """A window begins; `steps` optimiser steps will follow."""
        ...

    def step(self) -> None:
        """An optimiser step is done."""
        ...

    def frozen(self, row: Mapping[str, Any]) -> None:
        """A block is frozen; its row of the record."""
        ...


@dataclass
class BlockLoop:
    """Streams a model through pruning and reconstruction; the model's weights are changed in place."""

    model: LoadedModel
    texts: Texts
    pruning: PruningPlan
    technique: Technique
    stores: Stores
    state: RunState
    meter: StageMeter
    listener: Listener
    seed_training: int
    after_commit: Callable[[int, list[dict[str, Any]], list[dict[str, Any]]], None]
    _progress: Progress = field(default_factory=Progress)
    _dense_weights: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def run(self) -> tuple[list[dict[str, Any]], dict[int, dict[str, Tensor]]]:
        """Rows of all blocks, and their keep masks (stored layout). Goes on where an earlier run was killed."""
        windows = windows_over(len(self.model.blocks), self.technique.window, self.technique.stride)
        if self.state.windows_done() == len(windows):
            # Only an evaluation or an export is wanted: no activation has to be computed for it.
            done = self.state.restore(self.model.blocks)
            self.meter.go_on_from(done.measured)
            return done.rows, done.masks
        chains = self._resume(windows)
        for window in windows[self._progress.windows :]:
            self.listener.window(window, len(self.model.blocks), self._num_steps())
            untrained = chains.pruned
            for block in range(window.new, window.stop):
                untrained = self._enter(chains, window, block)
            if self.technique.trains:
                self._reconstruct(chains, window)
            rows = self._freeze(chains, window, untrained)
            self._commit(window, rows)
            for row in rows:
                self.listener.frozen(row)
        return self._progress.rows, self._progress.masks

    def _resume(self, windows: Sequence[BlockWindow]) -> Chains:
        """The chains at the first window that is not finished, replayed through the finished blocks."""
        progress = self._progress
        done = self.state.windows_done()
        reached = 0 if done == 0 else windows[done - 1].frozen
        entered = 0 if done == 0 else windows[done - 1].stop
        dense = {block: dense_copy(self.model, block) for block in range(entered)}
        with self.meter.stage("replay" if done else "embedding"):
            chains = Chains(self.model, self.texts.all, self.stores)
        restored = self.state.restore(self.model.blocks)
        progress.windows, progress.rows = restored.windows, restored.rows
        progress.pending, progress.masks = restored.pending, restored.masks
        if done:
            self.meter.go_on_from(restored.measured)
            # What a kill may have kept from the trackers is told again.
            self.after_commit(done, progress.rows, progress.rows)
        for block in range(entered):
            with self.meter.stage("replay"):
                current = dense_copy(self.model, block)
                self.model.blocks[block].load_state_dict(dense[block])
                chains.advance_dense(block)
                self.model.blocks[block].load_state_dict(current)
                if block < reached:
                    chains.pruned = chains.through(block, chains.pruned)
                    chains.forget_dense(block + 1)
                elif self._keeps_dense_weights:
                    self._dense_weights[block] = dense[block]
        return chains

    @property
    def _keeps_dense_weights(self) -> bool:
        """Only targets from the pruned chain's input need dense weights after their block is pruned."""
        return self.technique.trains and self.technique.target_chain == "sparse"

    def _num_steps(self) -> int:
        if not self.technique.trains:
            return 0
        samples = sum(len(text.tokens_NT) for text in self.texts.reconstruction)
        return self.technique.epochs * -(-samples // self.technique.batch_size)

    def _enter(self, chains: Chains, window: BlockWindow, block: int) -> Boundary:
        """Prune a block that is new in the window; returns the pruned chain behind it."""
        with self.meter.stage("dense chain"):
            chains.advance_dense(block)
            if self._keeps_dense_weights:
                self._dense_weights[block] = dense_copy(self.model, block)
        with self.meter.stage("pruned chain"):
            inputs = chains.pruned
            for earlier in range(window.first, block):
                inputs = chains.through(earlier, inputs)
        with self.meter.stage("statistics"):
            statistics = collect(self.pruning, chains, block, inputs, self.texts.mask)
        with self.meter.stage("pruning"):
            masks, layers = prune_block(self.pruning, self.model, block, statistics)
        with self.meter.stage("measuring"):
            outputs = chains.through(block, inputs)
            before = self._errors(chains, block, outputs)
        self._progress.masks[block] = masks
        self._progress.pending[block] = {"layers": layers, "before": before, "training": []}
        return outputs

    def _reconstruct(self, chains: Chains, window: BlockWindow) -> None:
        technique, model = self.technique, self.model
        texts = self.texts.reconstruction
        with self.meter.stage("reconstruction"):
            inputs = chains.pruned if technique.input_chain == "sparse" else chains.dense[window.first]
            if technique.target_chain == "dense":
                targets = chains.dense[window.stop]
            else:
                targets = self._dense_outputs(chains, window, chains.pruned, texts)
            pairs = Pairs([inputs[text.key] for text in texts], [targets[text.key] for text in texts])
            blocks = range(window.first, window.stop)
            order = generator(self.seed_training, "reconstruction", window.index)
            start = time.perf_counter()
            losses = reconstruct(
                model, blocks, self._progress.masks, pairs, technique, order, self.listener.step
            )
            seconds = round(time.perf_counter() - start, 3)
        told = {"window": window.index, "epoch_losses": losses, "seconds": seconds}
        for block in blocks:
            self._progress.pending[block]["training"].append(told)

    @torch.no_grad()
    def _dense_outputs(
        self, chains: Chains, window: BlockWindow, inputs: Boundary, texts: Sequence[TextSet]
    ) -> Boundary:
        """g(w̄; x): the dense window on the pruned chain's input."""
        states = inputs
        for block in range(window.first, window.stop):
            current = dense_copy(self.model, block)
            self.model.blocks[block].load_state_dict(self._dense_weights[block])
            states = chains.through(block, states, texts)
            self.model.blocks[block].load_state_dict(current)
        return states

    def _freeze(self, chains: Chains, window: BlockWindow, untrained: Boundary) -> list[dict[str, Any]]:
        """Pass the pruned chain on through the blocks that no later window trains, and measure them."""
        rows = []
        for block in range(window.first, window.frozen):
            with self.meter.stage("measuring"):
                # `untrained` lies behind the window's last block only if that block was new in it.
                reusable = not self.technique.trains and window.new <= block == window.stop - 1
                chains.pruned = untrained if reusable else chains.through(block, chains.pruned)
                after = self._errors(chains, block, chains.pruned)
            self._dense_weights.pop(block, None)
            rows.append({"block": block, **self._progress.pending.pop(block), "after": after})
        chains.forget_dense(window.frozen)
        return rows

    def _commit(self, window: BlockWindow, rows: list[dict[str, Any]]) -> None:
        progress = self._progress
        with self.meter.stage("writing"):
            done = window.index + 1
            frozen, still_open = range(window.first, window.frozen), range(window.frozen, window.stop)
            self.state.commit(
                done,
                self.model.blocks,
                frozen,
                still_open,
                rows,
                progress.pending,
                progress.masks,
                self.meter.state(),
            )
        progress.windows = done
        progress.rows += rows
        self.after_commit(done, progress.rows, rows)

    def _errors(self, chains: Chains, block: int, pruned: Boundary) -> dict[str, dict[str, dict[str, float]]]:
        """errᵢ and its relative twin on every text, by role and name."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for text in self.texts.all:
            errors = compare(chains.dense[block + 1][text.key], pruned[text.key])
            # The last step of a training is seen by no loss, and float16 may overflow without any training.
            if not isfinite(errors["error"]):
                raise RunError(
                    f"block {block}: its output on the {text.role} text {text.name} is not finite; "
                    "lower reconstruction.learning_rate or try dtype=float32"
                )
            found.setdefault(text.role, {})[text.name] = errors
        return found
