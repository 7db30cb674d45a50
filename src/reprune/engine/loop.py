"""The block loop: prune what enters a window, reconstruct the window, freeze what leaves it, write it down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol

from torch import Tensor

from reprune.calibration.roles import Texts
from reprune.engine.activations import Stores, compare
from reprune.engine.chains import Boundary, Chains, dense_copy
from reprune.engine.fitting import Fit, fits_of
from reprune.engine.layers import BlockPruning
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.state import Progress, RunState
from reprune.engine.stored_masks import StoredMasks
from reprune.engine.windows import BlockWindow, windows_over
from reprune.engine.work import WindowWork
from reprune.errors import RunError
from reprune.model.biases import give_biases
from reprune.model.loading import LoadedModel
from reprune.reconstruction.technique import Technique
from reprune.resources import StageMeter


class Listener(Protocol):
    """Who is told how the loop gets on."""

    def window(self, window: BlockWindow, num_blocks: int, steps: int) -> None:
        """A window begins; `steps` optimiser steps of this process will follow."""
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
    tracing: Callable[[], AbstractContextManager[None]] = nullcontext
    _progress: Progress = field(default_factory=Progress)
    _dense_weights: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def run(self) -> tuple[list[dict[str, Any]], StoredMasks]:
        """Rows of all blocks, and their keep masks. Goes on where an earlier run was killed."""
        if self.technique.writes_biases:
            give_biases(self.model, list(self.pruning.rounds[-1]))
        windows = windows_over(len(self.model.blocks), self.technique.window, self.technique.stride)
        if self.state.windows_done() == len(windows):
            # Only an evaluation or an export is wanted: no activation has to be computed for it.
            done = self.state.restore(self.model)
            self.meter.go_on_from(done.measured)
            return done.rows, self.state.masks(self.model)
        chains = self._resume(windows)
        turns = self._turns(windows[self._progress.windows :])
        for turn in turns:
            # The first one warms caches up.
            with self.tracing() if turn is turns[:2][-1] else nullcontext():
                self._do(chains, turn)
        return self._progress.rows, self.state.masks(self.model)

    def _turns(self, windows: Sequence[BlockWindow]) -> list[list[BlockWindow]]:
        """The windows that are done at once, turn by turn."""
        return [[window] for window in windows]

    def _do(self, chains: Chains, turn: Sequence[BlockWindow]) -> None:
        """Prune what enters a window, reconstruct it, freeze what leaves it."""
        [window] = turn
        self._begin(window, self._work.num_steps(window))
        untrained = chains.pruned
        # Where weights rest on disk, what happens to them in between is lost before it is committed.
        with self.model.resident(*self.model.blocks[window.first : window.stop]):
            for number in self._work.rounds(window):
                untrained = self._prune(chains, window, number)
                if self._work.trains_after(window, number):
                    self._reconstruct(chains, window, number)
            self._end(chains, window, untrained)

    def _begin(self, window: BlockWindow, steps: int) -> None:
        self.listener.window(window, len(self.model.blocks), steps)

    def _end(self, chains: Chains, window: BlockWindow, untrained: Boundary) -> None:
        """Freeze what leaves a window and write it down; `untrained` is the pruned chain behind it before its training."""
        rows = self._freeze(chains, window, untrained)
        self._commit(chains, window, rows)
        for row in rows:
            self.listener.frozen(row)

    def _resume(self, windows: Sequence[BlockWindow]) -> Chains:
        """The chains at the first window that is not finished, replayed through the finished blocks."""
        progress = self._progress
        done = self.state.windows_done()
        reached = 0 if done == 0 else windows[done - 1].frozen
        entered = 0 if done == 0 else windows[done - 1].stop
        stage = "replay" if done else "embedding"
        with self.meter.stage(stage):
            chains = Chains(self.model, self.texts.all, self.stores)
            # While the model is dense: only the blocks that are still open need a copy of their weights.
            for block in range(entered):
                if self._keeps_dense_weights and block >= reached:
                    self._dense_weights[block] = dense_copy(self.model, block)
                chains.advance_dense(block)
                chains.forget_dense(min(block + 1, reached))
        restored = self.state.restore(self.model)
        progress.windows, progress.rows = restored.windows, restored.rows
        progress.pending, progress.masks = restored.pending, restored.masks
        if done:
            self.meter.go_on_from(restored.measured)
            # What a kill may have kept from the trackers is told again.
            self.after_commit(done, progress.rows, progress.rows)
        with self.meter.stage(stage):
            for block in range(reached):
                chains.pruned = chains.through(block, chains.pruned)
        return chains

    @property
    def _work(self) -> WindowWork:
        return WindowWork(self.model, self.texts, self.pruning, self.technique)

    @property
    def _keeps_dense_weights(self) -> bool:
        return self._work.keeps_dense_weights

    def _prune(self, chains: Chains, window: BlockWindow, number: int | None) -> Boundary:
        """One round over the blocks that are new in the window; returns the pruned chain behind the last of them."""
        inputs = chains.pruned
        if number is None:
            return inputs
        with self.meter.stage("pruned chain"):
            for earlier in range(window.first, window.new):
                inputs = chains.through(earlier, inputs)
        for block in range(window.new, window.stop):
            inputs = self._prune_block(chains, block, number, inputs)
        return inputs

    def _prune_block(self, chains: Chains, block: int, number: int, inputs: Boundary) -> Boundary:
        """Prune a block in one round; returns the pruned chain behind it."""
        if number == 0:
            with self.meter.stage("dense chain"):
                chains.advance_dense(block)
                self._keep_dense(block)
        layers = self._prune_layers(chains, block, number, inputs)
        return self._measure_pruned(chains, block, number, inputs, layers)

    def _keep_dense(self, block: int) -> None:
        """Copy the weights of a block that is dense still, where they are read later."""
        if self._keeps_dense_weights:
            self._dense_weights[block] = dense_copy(self.model, block)

    def _prune_layers(self, chains: Chains, block: int, number: int, inputs: Boundary) -> dict[str, Any]:
        """Prune a block's layers in one round; their rows for the record."""
        pruning = BlockPruning(
            plan=self.pruning,
            technique=self.technique,
            chains=chains,
            texts=self.texts,
            block=block,
            number=number,
            inputs=inputs,
            dense_inputs=chains.dense[block],
            dense_weights=self._dense_weights.get(block, {}),
            masks=self._progress.masks.get(block, {}),
            meter=self.meter,
        )
        self._progress.masks[block], layers = pruning.run()
        return layers

    def _measure_pruned(
        self, chains: Chains, block: int, number: int, inputs: Boundary, layers: dict[str, Any]
    ) -> Boundary:
        """Note what pruning did to a block; returns the pruned chain behind it."""
        progress = self._progress
        with self.meter.stage("measuring"):
            outputs = chains.through(block, inputs)
            before = self._errors(chains, block, outputs)
        training = []
        if number:
            earlier = progress.pending[block]
            training = earlier["training"]
            for name, layer in layers.items():
                layer["notes"] = [*earlier["layers"][name]["notes"], *layer["notes"]]
        progress.pending[block] = {"layers": layers, "before": before, "training": training}
        return outputs

    def _reconstruct(self, chains: Chains, window: BlockWindow, number: int | None) -> None:
        """Train the window, or each submodule of its one block in turn."""
        blocks = range(window.first, window.stop)
        with self.meter.stage("reconstruction"):
            fit = Fit(
                chains=chains,
                texts=self.texts,
                technique=self.technique,
                blocks=blocks,
                masks=self._progress.masks,
                dense_weights=self._dense_weights,
                seed=self.seed_training,
                purpose=(window.index, *([number] if number else [])),
                on_step=self.listener.step,
                thinned=self.pruning.thinned(window.first),
            )
            trained = [part.run() for part in fits_of(fit)]
        for told in trained:
            told = {"window": window.index, **({"round": number} if number else {}), **told}
            for block in blocks:
                self._progress.pending[block]["training"].append(told)

    def _freeze(self, chains: Chains, window: BlockWindow, untrained: Boundary) -> list[dict[str, Any]]:
        """Pass the pruned chain on through the blocks that no later window trains, and measure them."""
        rows = []
        for block in range(window.first, window.frozen):
            with self.meter.stage("measuring"):
                # `untrained` lies behind the window's last block only if that block was new in it.
                reusable = not self._work.trains(window) and window.new <= block == window.stop - 1
                chains.pruned = untrained if reusable else chains.through(block, chains.pruned)
                after = self._errors(chains, block, chains.pruned)
            self._dense_weights.pop(block, None)
            rows.append({"block": block, **self._progress.pending.pop(block), "after": after})
        chains.forget_dense(window.frozen)
        return rows

    def _commit(self, chains: Chains, window: BlockWindow, rows: list[dict[str, Any]]) -> None:
        progress = self._progress
        with self.meter.stage("writing"):
            done = window.index + 1
            frozen, still_open = range(window.first, window.frozen), range(window.frozen, window.stop)
            if chains.ranks.first:
                self.state.commit(
                    done,
                    self.model,
                    frozen,
                    still_open,
                    rows,
                    progress.pending,
                    progress.masks,
                    self.meter.state(),
                )
            chains.ranks.wait()
            self.state.rest(done, self.model, frozen, still_open)
        for block in frozen:
            progress.masks.pop(block)
        progress.windows = done
        progress.rows += rows
        self.after_commit(done, progress.rows, rows)

    def _errors(self, chains: Chains, block: int, pruned: Boundary) -> dict[str, dict[str, dict[str, float]]]:
        """errᵢ and its relative twin on every text, by role and name."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for text in self.texts.all:
            errors = compare(chains.dense[block + 1][text.key], pruned[text.key], chains.ranks)
            # The last step of a training is seen by no loss, and float16 may overflow without any training.
            if not isfinite(errors["error"]):
                raise RunError(
                    f"block {block}: its output on the {text.role} text {text.name} is not finite; "
                    "lower reconstruction.learning_rate or try dtype=float32"
                )
            found.setdefault(text.role, {})[text.name] = errors
        return found
