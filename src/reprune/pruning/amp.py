"""Pruner `amp` (Mugnaini et al., 2025, "Efficient LLMs with AMP", arXiv 2504.21174)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.pruning.contract import LayerContext, UnitPruner


@dataclass(kw_only=True)
class AMP(UnitPruner):
    """I_n = ‖h_n W_n‖₁ of a head n, I_m = E|x_m| of an MLP channel m, both means over tokens.

    h_n is what enters the head's columns W_n of the output projection, x_m what enters the down projection. Heads that
    share keys and values are one unit, and h_n W_n is their common part of the output, where the paper has each head.
    """

    def unit_scores(self, consumer: LayerContext, columns: Tensor, projected: Tensor) -> Tensor:
        """See UnitPruner."""
        if columns.shape[1] > 1:
            return projected
        # |x_m| · ‖W_:m‖₁ is what one channel puts out; a channel that nothing reads puts out nothing.
        size = consumer.weight.float().abs().sum(dim=0)[columns[:, 0]]
        return torch.where(size > 0, projected / size, 0)
