"""Pruner `wanda_plus_plus` (Yang et al., 2025, arXiv 2503.04992)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from torch import Tensor

from reprune.errors import require_nonnegative
from reprune.pruning.contract import LayerContext, Needs, ScorePruner
from reprune.sparsity.patterns import Group


@dataclass(kw_only=True)
class WandaPlusPlus(ScorePruner):
    """The regional gradient score S_ij = |W_ij| · (‖X_j‖₂ / √N + α · G_ij), compared within the output row.

    G is the root mean square over the N sequences of the gradient of ‖f(x)‖₂, f the block; `alpha` is 100. The norm is
    per sequence too, as Wanda's code has it, so that the ratio does not depend on N. The score alone: the paper's regional optimisation is `schedule=repeated reconstruction=regional` beside it, in which the mask is
    chosen anew after every few steps of RMSprop towards the dense block's output.
    """

    alpha: float = 100.0

    needs: ClassVar[Needs] = Needs(norm=True, block_gradients=True)
    within: ClassVar[Group] = Group.ROW

    def __post_init__(self) -> None:
        require_nonnegative(alpha=self.alpha)

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        gradients = layer.regional_gradients
        inputs = layer.inputs.norm / sqrt(gradients.num_sequences)
        return layer.weight.float().abs() * (inputs + self.alpha * gradients.mean_square.sqrt())
