"""Schedule `iterative`: the sparsity grows over rounds, each with statistics of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reprune.errors import require_positive
from reprune.sparsity.schedule import Masks, ReconstructAt


@dataclass(kw_only=True)
class Iterative:
    """s_t for t = 1 … T rounds towards s.

    `linear`: s·t/T. `geometric`: 1 − (1 − s)^(t/T), every round removes the same share of what is left. `cubic`:
    s·(1 − (1 − t/T)³), most early on (arXiv 1710.01878, eq. 1, from sparsity 0).
    """

    rounds: int = 4
    shape: Literal["linear", "geometric", "cubic"] = "cubic"
    reconstruct: ReconstructAt = "each_round"
    masks: Masks = "monotone"

    def __post_init__(self) -> None:
        require_positive(rounds=self.rounds)

    def steps(self, sparsity: float) -> Sequence[float]:
        """See Schedule."""
        shares = [(number + 1) / self.rounds for number in range(self.rounds - 1)]
        if self.shape == "linear":
            reached = [sparsity * share for share in shares]
        elif self.shape == "geometric":
            reached = [1 - (1 - sparsity) ** share for share in shares]
        else:
            reached = [sparsity * (1 - (1 - share) ** 3) for share in shares]
        return [*reached, sparsity]
