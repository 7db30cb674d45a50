"""Pruner `fisher`: optimal brain damage with the empirical Fisher diagonal (LeCun et al., 1990; Theis et al., 2018, arXiv 1801.05787)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from reprune.pruning.contract import LayerContext, Needs, ScorePruner
from reprune.sparsity.patterns import Group


@dataclass(kw_only=True)
class Fisher(ScorePruner):
    """S_ij = ½ W_ij² · mean_n g_n,ij², g_n the gradient of sequence n's mean next-token loss in the dense model.

    Compared within the `matrix` or the output `row`.
    """

    compare: Literal["matrix", "row"] = "row"

    needs: ClassVar[Needs] = Needs(gradients=True)

    def __post_init__(self) -> None:
        self.within = Group(self.compare)  # type: ignore[misc]

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        return 0.5 * layer.weight.float().square() * layer.loss_gradients.mean_square
