"""What a window asks for: in which rounds it is pruned, whether it is trained, in how many steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reprune.calibration.roles import Texts
from reprune.engine.fitting import submodules_of
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.windows import BlockWindow
from reprune.model.loading import LoadedModel
from reprune.reconstruction.technique import Technique


@dataclass(frozen=True)
class WindowWork:
    """The work of any window of a run."""

    model: LoadedModel
    texts: Texts
    pruning: PruningPlan
    technique: Technique

    @property
    def last_round(self) -> int:
        """The number of the schedule's last round, counted from 0."""
        return len(self.pruning.rounds) - 1

    def rounds(self, window: BlockWindow) -> Iterator[int | None]:
        """The schedule's rounds, or None once for a window in which no block is new."""
        if window.new == window.stop:
            yield None
        else:
            yield from range(len(self.pruning.rounds))

    def trains(self, window: BlockWindow) -> bool:
        """A window that loses nothing has nothing to restore, and Adam would make full steps of rounding errors."""
        blocks = range(window.first, window.stop)
        return self.technique.trains and any(map(self.pruning.thinned, blocks))

    def trains_after(self, window: BlockWindow, number: int | None) -> bool:
        """Whether a round of a window is followed by training."""
        return self.trains(window) and (number in (None, self.last_round) or self._each_round)

    @property
    def keeps_dense_weights(self) -> bool:
        """Whether dense weights of a block are read after the block was first pruned."""
        return self.technique.needs_dense_weights or self.last_round > 0

    def num_steps(self, window: BlockWindow) -> int:
        """Optimiser steps of all its trainings."""
        if not self.trains(window):
            return 0
        samples = sum(len(text.tokens_NT) for text in self.texts.reconstruction)
        trainings = len(list(self.rounds(window))) if self._each_round else 1
        if self.technique.granularity == "submodule":
            thinned = self.pruning.thinned(window.first)
            trainings *= len(submodules_of(self.model, window.first, thinned))
        return trainings * self.technique.epochs * -(-samples // self.technique.batch_size)

    @property
    def _each_round(self) -> bool:
        return self.pruning.reconstruct == "each_round"
