"""Pruner `gblm` (Das et al., 2023, "Beyond Size", arXiv 2311.04902)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reprune.errors import require_nonnegative
from reprune.pruning.contract import LayerContext, Needs, ScorePruner
from reprune.sparsity.patterns import Group


@dataclass(kw_only=True)
class GBLM(ScorePruner):
    """S_ij = |W_ij| · (‖X_j‖₂ + α · √(Σ_n g_n,ij²)), compared within the output row.

    g_n is the gradient of sequence n's mean next-token loss in the dense model; both terms are root sums over the same
    sequences, so that their ratio does not depend on how many there are. `alpha` is 100 in the paper.
    """

    alpha: float = 100.0

    needs: ClassVar[Needs] = Needs(norm=True, gradients=True)
    within: ClassVar[Group] = Group.ROW

    def __post_init__(self) -> None:
        require_nonnegative(alpha=self.alpha)

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        gradients = layer.loss_gradients
        root_sum = (gradients.mean_square * gradients.num_sequences).sqrt()
        return layer.weight.float().abs() * (layer.inputs.norm + self.alpha * root_sum)
