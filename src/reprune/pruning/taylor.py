"""Pruner `snip` (Lee et al., 2019, arXiv 1810.02340; first-order Taylor, Molchanov et al., 2017, arXiv 1611.06440)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from reprune.pruning.contract import LayerContext, Needs, ScorePruner
from reprune.sparsity.patterns import Group


@dataclass(kw_only=True)
class Taylor(ScorePruner):
    """S_ij = |W_ij · ∂L/∂W_ij|, L the mean next-token loss of the dense model over the mask data.

    To first order what removing the weight changes of the loss. Compared within the `matrix` or the output `row`
    (allocation=global: over all layers, as SNIP does).
    """

    compare: Literal["matrix", "row"] = "row"

    needs: ClassVar[Needs] = Needs(gradients=True)

    def __post_init__(self) -> None:
        self.within = Group(self.compare)  # type: ignore[misc]

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        return (layer.weight.float() * layer.loss_gradients.mean).abs()
