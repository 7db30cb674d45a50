"""Schedule `repeated`: the whole sparsity several times, the mask chosen anew after each reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reprune.errors import require_positive
from reprune.sparsity.schedule import Masks, ReconstructAt


@dataclass(kw_only=True)
class Repeated:
    """s, s, … s: Wanda++'s regional optimisation (arXiv 2503.04992, algorithm 1) with K = `rounds`."""

    rounds: int = 5

    masks: ClassVar[Masks] = "free"
    reconstruct: ClassVar[ReconstructAt] = "each_round"

    def __post_init__(self) -> None:
        require_positive(rounds=self.rounds)

    def steps(self, sparsity: float) -> Sequence[float]:
        """See Schedule."""
        return [sparsity] * self.rounds
