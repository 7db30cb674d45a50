"""Pruner `wanda` (Sun et al., 2023, arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reprune.pruning.contract import LayerContext, Needs, ScorePruner
from reprune.sparsity.patterns import Group


@dataclass(kw_only=True)
class Wanda(ScorePruner):
    """S_ij = |W_ij| · ‖X_j‖₂, compared within the output row (eq. 1)."""

    needs: ClassVar[Needs] = Needs(norm=True)
    within: ClassVar[Group] = Group.ROW

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        return layer.weight.float().abs() * layer.inputs.norm
