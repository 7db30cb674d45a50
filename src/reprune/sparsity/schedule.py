"""The contract of schedules: in how many rounds the sparsity is reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

ReconstructAt = Literal["each_round", "end"]
Masks = Literal["monotone", "free"]


class Schedule(Protocol):
    """Rounds over the blocks that are new in a window, each with statistics of its own.

    `reconstruct`: after each round, or after the last. `masks`: `monotone` never brings a removed weight back; `free`
    chooses the mask of each round anew, weights that were removed competing with their dense values.
    """

    @property
    def reconstruct(self) -> ReconstructAt:
        """When the window is reconstructed."""
        ...

    @property
    def masks(self) -> Masks:
        """Whether a removed weight may return in a later round."""
        ...

    def steps(self, sparsity: float) -> Sequence[float]:
        """Ascending sparsities, one a round; the last is `sparsity`."""
        ...
