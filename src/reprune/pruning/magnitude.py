"""Pruner `magnitude`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reprune.pruning.contract import LayerContext, ScorePruner


@dataclass(kw_only=True)
class Magnitude(ScorePruner):
    """S_ij = |W_ij|, compared within the matrix."""

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        return layer.weight.float().abs()
