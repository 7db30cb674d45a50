"""Refinement `dsnot` (Zhang et al., 2024, arXiv 2310.08915)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.errors import require_nonnegative, require_positive
from reprune.pruning.contract import LayerContext, Needs, require_finite
from reprune.sparsity.patterns import Pattern


@dataclass(kw_only=True)
class DSnoT:
    """Swaps in every row that bring its expected reconstruction error ε = Σ_pruned W_j E[X_j] towards zero.

    A cycle brings back the pruned weight with the largest sign(ε) W_j E[X_j] / Var[X_j], which lowers |ε|, and removes
    the kept weight with the lowest Wanda score |W_j| ‖X_j‖ among those with sign(ε) W_j E[X_j] < 0, whose removal lowers
    |ε| too. A row stops after `cycles`, when `tokens` · |ε| is at most `threshold`, when it has no such pair, or when
    the swap would overshoot so far that |ε| would not fall. With a pattern that has groups of columns both weights are of
    one group: the weight that comes back is the best one whose group has one to remove.

    `cycles` and `threshold` are the paper's. Its code takes sums over a sequence of 2048 tokens where the paper has
    means over tokens; `tokens` says so here, without it the threshold would leave most rows as they are. Deviations:
    the paper's code goes on when |ε| rises, removes without a look at the sign where the pattern has groups, and takes
    the variance within sequences, here it is over all tokens. A variance below rounding counts as rounding.
    """

    cycles: int = 50
    threshold: float = 0.1
    tokens: int = 2048

    needs: ClassVar[Needs] = Needs(norm=True)

    def __post_init__(self) -> None:
        require_positive(cycles=self.cycles, tokens=self.tokens)
        require_nonnegative(threshold=self.threshold)

    @torch.no_grad()
    def refine(self, layer: LayerContext, keep: Tensor, pattern: Pattern) -> Tensor:
        """See Refinement."""
        inputs = layer.inputs
        weight = layer.weight.float()
        expected = weight * inputs.mean
        rounding = torch.finfo(weight.dtype).eps * inputs.norm.square() / max(1, inputs.num_tokens)
        # 0/0 for dead inputs, which have no share in ε and are never chosen.
        gain = expected / inputs.variance.maximum(rounding)
        wanda = weight.abs() * inputs.norm
        for scores in (expected, wanda):
            require_finite(scores, layer)
        barred = torch.zeros_like(keep) if layer.removed is None else layer.removed
        group = weight.shape[1] if pattern.columns is None else pattern.columns
        keep = keep.clone()
        error = expected.masked_fill(keep, 0).sum(dim=1, keepdim=True)
        rows = torch.arange(len(weight), device=weight.device)
        for _ in range(self.cycles):
            rows = rows[self.tokens * error[rows, 0].abs() > self.threshold]
            if len(rows) == 0:
                break
            sign, kept = error[rows].sign(), keep[rows]
            towards = sign * expected[rows]
            leaving = (
                wanda[rows].masked_fill(~(kept & (towards < 0)), torch.inf).reshape(len(rows), -1, group)
            )
            # The first kept weight of every group that would go, and whether there is any.
            score, which = leaving.min(dim=2)
            possible = (score < torch.inf).repeat_interleave(group, dim=1)
            coming = possible & ~(kept | barred[rows]) & (towards > 0)
            best, grown = (sign * gain[rows]).masked_fill(~coming, -torch.inf).max(dim=1, keepdim=True)
            of_group = grown // group
            pruned = of_group * group + which.gather(1, of_group)
            after = error[rows] + expected[rows].gather(1, pruned) - expected[rows].gather(1, grown)
            falls = ((best > -torch.inf) & (after.abs() < error[rows].abs()))[:, 0]
            rows = rows[falls]
            error[rows] = after[falls]
            keep[rows, grown[falls, 0]] = True
            keep[rows, pruned[falls, 0]] = False
        return keep
