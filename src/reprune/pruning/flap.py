"""Pruner `flap` (An et al., 2023, "Fluctuation-based Adaptive Structured Pruning", arXiv 2312.11983)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reprune.pruning.contract import LayerContext, Needs, ScorePruner


@dataclass(kw_only=True)
class FLAP(ScorePruner):
    """S_ij = Var(X_j) · W_ij², whose sum over a column is the paper's fluctuation metric, equation 4.

    An input that hardly varies can go and be replaced by its mean. All of the method is `method=flap`: heads and channels
    go by the sums over the columns of their consumer (`pattern=structured pattern.scores_of=consumer`), one ranking over
    the model says how many (`allocation=global_units`), and a bias holds the mean (`reconstruction=bias_compensation`).
    """

    needs: ClassVar[Needs] = Needs(norm=True)

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        return layer.weight.float().square() * layer.inputs.variance
