"""The block loop of several processes where windows are independent: each process does whole windows by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprune.engine.chains import Boundary, Chains, dense_copy
from reprune.engine.layers import say_notes
from reprune.engine.loop import BlockLoop
from reprune.engine.windows import BlockWindow
from reprune.ranks import Ranks
from reprune.reconstruction.technique import Technique


def spreads(technique: Technique, num_rounds: int, tied: str | None, ranks: Ranks) -> bool:
    """Whether processes take a window each (arXiv 2510.14444), rather than a part of every window's text.

    `tied` names tensors that blocks share, None where they share none: windows with the same weights are not independent.
    """
    return ranks.several and num_rounds == 1 and tied is None and technique.independent_windows


@dataclass
class SpreadLoop(BlockLoop):
    """As many windows at once as there are processes.

    The dense chain goes through all of them, text shared as ever. Then each process prunes and trains its window on all
    of the text, exactly as one process would that has the run for itself; and the pruned chain goes through what came of
    it, window by window.
    """

    def _turns(self, windows: Sequence[BlockWindow]) -> list[list[BlockWindow]]:
        count = self.model.plan.ranks.count
        return [list(windows[start : start + count]) for start in range(0, len(windows), count)]

    def _do(self, chains: Chains, turn: Sequence[BlockWindow]) -> None:
        number = chains.ranks.number
        mine = turn[number] if number < len(turn) else None
        # What this process changes must not be read again before it is committed.
        with self.model.resident(*([] if mine is None else self.model.blocks[mine.first : mine.stop])):
            with self.meter.stage("dense chain"):
                for block in range(turn[0].first, turn[-1].stop):
                    chains.advance_dense(block)
            done = None if mine is None else self._alone(chains, mine)
            for owner, window in enumerate(turn):
                own = done if owner == number else None
                if own is None:
                    self._begin(window, 0)
                with self.model.resident(*self.model.blocks[window.first : window.stop]):
                    self._end(chains, window, self._taken_over(chains, window, owner, own))

    def _alone(self, chains: Chains, window: BlockWindow) -> _Done:
        """Prune and train a window in this process."""
        alone = chains.apart()
        blocks = range(window.first, window.stop)
        self._begin(window, self._work.num_steps(window))
        for block in blocks:
            self._keep_dense(block)
        layers = {block: self._prune_layers(alone, block, 0, chains.dense[block]) for block in blocks}
        pruned = [dict(dense_copy(self.model, block)) for block in blocks]
        for block in blocks:
            self._progress.pending[block] = {"training": []}
        if self._work.trains(window):
            self._reconstruct(alone, window, 0)
        training = {
            block: [
                {**row, "process": chains.ranks.number}
                for row in self._progress.pending.pop(block)["training"]
            ]
            for block in blocks
        }
        masks = {block: list(self._progress.masks[block]) for block in blocks}
        told = {"layers": _named(layers), "training": _named(training), "masks": _named(masks)}
        return _Done(pruned, [dict(dense_copy(self.model, block)) for block in blocks], told)

    def _taken_over(self, chains: Chains, window: BlockWindow, owner: int, own: _Done | None) -> Boundary:
        """Every process has what `owner` made of a window, `own` if it is this one; the pruned chain before its training."""
        ranks, blocks = chains.ranks, range(window.first, window.stop)
        with self.meter.stage("exchange"):
            told: dict[str, Any] = ranks.gathered(None if own is None else own.told)[owner]
            for block in blocks:
                self._take_masks(ranks, block, owner, told["masks"][str(block)])
            self._take_weights(ranks, blocks, owner, None if own is None else own.pruned)
        behind = chains.pruned
        for block in blocks:
            layers = told["layers"][str(block)]
            if own is None:
                # The process that has found something said nothing.
                say_notes(block, layers)
            behind = self._measure_pruned(chains, block, 0, behind, layers)
            self._progress.pending[block]["training"] = told["training"][str(block)]
        if self._work.trains(window):
            with self.meter.stage("exchange"):
                self._take_weights(ranks, blocks, owner, None if own is None else own.trained)
        return behind

    def _take_masks(self, ranks: Ranks, block: int, owner: int, names: Sequence[str]) -> None:
        masks = self._progress.masks.setdefault(block, {})
        for name in names:
            if ranks.number != owner:
                masks[name] = torch.empty(self.model.linears[block][name].stored.shape, dtype=torch.bool)
        ranks.same_([masks[name] for name in names], owner)

    @torch.no_grad()
    def _take_weights(
        self, ranks: Ranks, blocks: range, owner: int, own: Sequence[dict[str, Tensor]] | None
    ) -> None:
        for place, block in enumerate(blocks):
            parameters = dict(self.model.blocks[block].named_parameters())
            if own is not None:
                for name, tensor in own[place].items():
                    parameters[name].copy_(tensor)
            ranks.same_(parameters.values(), owner)


@dataclass(frozen=True)
class _Done:
    """What a process made of a window: parameters of its blocks before and after training, and what is recorded of it."""

    pruned: Sequence[dict[str, Tensor]]
    trained: Sequence[dict[str, Tensor]]
    told: dict[str, Any]


def _named(by_block: dict[int, Any]) -> dict[str, Any]:
    """As JSON has it."""
    return {str(block): value for block, value in by_block.items()}
