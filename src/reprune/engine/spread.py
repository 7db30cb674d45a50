"""The block loop of several processes where windows are independent: each process does whole windows by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprune.engine.chains import Boundary, Chains, dense_copy
from reprune.engine.loop import BlockLoop
from reprune.engine.windows import BlockWindow
from reprune.ranks import Ranks
from reprune.reconstruction.technique import Technique

LOG = logging.getLogger("reprune")


def spreads(technique: Technique, num_rounds: int, ranks: Ranks) -> bool:
    """Whether processes take a window each (arXiv 2510.14444), rather than a part of every window's text."""
    return ranks.several and num_rounds == 1 and technique.independent_windows


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
        blocks = [block for window in turn for block in range(window.first, window.stop)]
        with self.model.resident(*(self.model.blocks[block] for block in blocks)):
            for block in blocks:
                self._pass_dense(chains, block)
            mine = [self._alone(chains, window) for window in turn[chains.ranks.number :][:1]]
            for owner, window in enumerate(turn):
                own = mine[0] if owner == chains.ranks.number else None
                self._end(chains, window, self._taken_over(chains, window, owner, own))

    def _alone(self, chains: Chains, window: BlockWindow) -> _Done:
        """Prune and train a window in this process."""
        alone = chains.apart()
        blocks = range(window.first, window.stop)
        self._begin(window)
        layers = {block: self._prune_layers(alone, block, 0, chains.dense[block]) for block in blocks}
        pruned = [dict(dense_copy(self.model, block)) for block in blocks]
        for block in blocks:
            self._progress.pending[block] = {"training": []}
        if self._trains(window):
            self._reconstruct(alone, window, 0)
        training = {block: self._progress.pending.pop(block)["training"] for block in blocks}
        masks = {block: list(self._progress.masks[block]) for block in blocks}
        told = {"layers": _named(layers), "training": _named(training), "masks": _named(masks)}
        return _Done(pruned, [dict(dense_copy(self.model, block)) for block in blocks], told)

    def _taken_over(self, chains: Chains, window: BlockWindow, owner: int, own: _Done | None) -> Boundary:
        """Every process has what `owner` made of a window, `own` if it is this one; the pruned chain before its training."""
        ranks, blocks = chains.ranks, range(window.first, window.stop)
        told: dict[str, Any] = ranks.gathered(None if own is None else own.told)[owner]
        for block in blocks:
            self._take_masks(ranks, block, owner, told["masks"][str(block)])
        self._take_weights(ranks, blocks, owner, None if own is None else own.pruned)
        behind = chains.pruned
        for block in blocks:
            layers = told["layers"][str(block)]
            if own is None:
                _say_notes(block, layers)
            behind = self._measure_pruned(chains, block, 0, behind, layers)
            self._progress.pending[block]["training"] = told["training"][str(block)]
        if self._trains(window):
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


def _say_notes(block: int, layers: dict[str, Any]) -> None:
    """What a process that says nothing noted."""
    for name, row in layers.items():
        for note in row["notes"]:
            LOG.warning("block %s, layer %s: %s", block, name, note)
