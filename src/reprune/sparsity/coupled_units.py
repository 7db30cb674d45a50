"""Pattern `structured`: attention heads, with what they share keys and values with, and MLP channels go as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reprune.sparsity.patterns import AnyCount, Group, count_removed, keep_highest


@dataclass(kw_only=True)
class CoupledUnits(AnyCount):
    """Units of attention and MLP (`model.coupling`): rows of the producing layers, columns of the consuming one.

    A unit's score is the sum of the scores of its weights: of `all` of them (LLM-Pruner's sum over a coupled group,
    Ma et al., 2023, arXiv 2305.11627), or of its columns of the `consumer` alone. round-half-up(units · sparsity) of the
    units of each submodule go, those with the lowest scores. One unit always stays. Where query heads share keys and
    values, all heads of a group are one unit, so that few groups make coarse steps: of three groups at 50 % two go, of a
    single one none. What went is in the record, by layer.
    """

    scores_of: Literal["all", "consumer"] = "all"

    @property
    def units(self) -> bool:
        """True: that is what it is."""
        return True

    def keep(self, scores: Tensor, sparsity: float, within: Group) -> Tensor:
        """Of a layer by itself: whole columns, those with the lowest sums, whatever they are compared within."""
        columns = self.keep_units(scores.sum(dim=0), sparsity)
        return columns.expand(scores.shape).clone()

    def keep_units(self, scores: Tensor, sparsity: float) -> Tensor:
        """Bool [units], True where the unit stays; one always does."""
        removed = min(count_removed(len(scores), sparsity), len(scores) - 1)
        return keep_highest(scores[None], removed)[0]

    def unit_scores(
        self, scores: Mapping[str, Tensor], consumer: str, columns: Tensor, rows: Mapping[str, Tensor]
    ) -> Tensor:
        """Sums [units] over the weights of each unit; `scores` by layer [d_out, d_in], the rest as in `model.coupling.Coupling`."""
        total = scores[consumer].sum(dim=0)[columns].sum(dim=1)
        if self.scores_of == "all":
            own = [scores[name].sum(dim=1)[places].sum(dim=1) for name, places in rows.items()]
            total = torch.stack([total, *own]).sum(dim=0)
        return total
