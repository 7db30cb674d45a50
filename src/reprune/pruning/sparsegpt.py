"""Pruner `sparsegpt` (Frantar & Alistarh, 2023, arXiv 2301.00774)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.errors import ConfigError, require_nonnegative, require_positive
from reprune.pruning.contract import LayerContext, LayerShape, Needs, Pruned, rank_first, require_finite
from reprune.sparsity.patterns import Group, Pattern

SWEEP_COLUMNS = 16


@dataclass(kw_only=True)
class SparseGPT:
    """Column-sequential OBS with masks chosen per block of columns (Algorithm 1).

    H = 2/n Σ x xᵀ + damp · mean(diag H) · I, C the upper Cholesky factor of H⁻¹. Scores W_ij²/C_jj² of the already
    updated weights; unstructured removes the lowest share over all rows × `block_size` columns jointly, N:M decides
    when the sweep reaches the group. A removed weight's error e = w/C_jj moves to the later columns: W_:,j: −= e C_j,j:.
    """

    damp: float = 0.01
    block_size: int = 128

    needs: ClassVar[Needs] = Needs(gram=True)

    def __post_init__(self) -> None:
        require_nonnegative(damp=self.damp)
        require_positive(block_size=self.block_size)

    def check(self, pattern: Pattern) -> None:
        """Groups of the pattern must not cross blocks of columns."""
        group = pattern.columns
        if group is not None and self.block_size % group:
            raise ConfigError(
                "pruner.block_size",
                f"must be a multiple of the pattern's group of {group}",
                value=self.block_size,
            )

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """None: the sweep chooses."""
        return None

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        self.check(pattern)
        group = pattern.columns
        factor, notes = layer.inputs.inverse_factor(self.damp, f"block {layer.block}, layer {layer.name}")
        # A copy in any case: the transpose of a weight that is stored transposed is contiguous as it is.
        weight_T = layer.weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        weight_T[layer.inputs.dead] = 0
        keep_T = torch.ones_like(weight_T, dtype=torch.bool)
        removed_T = None if layer.removed is None else layer.removed.T
        for start in range(0, len(weight_T), self.block_size):
            stop = min(start + self.block_size, len(weight_T))
            inner = factor[start:stop, start:stop]
            block_T, block_keep_T = weight_T[start:stop], keep_T[start:stop]
            removed = None if removed_T is None else removed_T[start:stop]
            if group is None:
                scores = (block_T / inner.diagonal()[:, None]).square()
                require_finite(scores, layer)
                scores = rank_first(scores, removed)
                block_keep_T.copy_(pattern.keep(scores, sparsity, Group.MATRIX))
            errors_T = _sweep(block_T, block_keep_T, removed, inner, pattern, sparsity)
            weight_T[stop:] -= factor[start:stop, stop:].T @ errors_T
        require_finite(weight_T, layer)
        return Pruned(weight_T.T.to(layer.weight.dtype).contiguous(), keep_T.T.contiguous(), notes)


def _sweep(
    weight_T: Tensor,
    keep_T: Tensor,
    removed_T: Tensor | None,
    factor: Tensor,
    pattern: Pattern,
    sparsity: float,
) -> Tensor:
    """Go through one block's columns in order, changing `weight_T` and, for N:M, `keep_T` [columns, d_out] in place.

    Updates reach a few columns at once and the rest of the block by one product. Returns the errors [columns, d_out].
    """
    group = pattern.columns
    step = SWEEP_COLUMNS if group is None else group * max(1, SWEEP_COLUMNS // group)
    errors_T = torch.zeros_like(weight_T)
    diagonal = factor.diagonal().tolist()
    for first in range(0, len(weight_T), step):
        last = min(first + step, len(weight_T))
        for column in range(first, last):
            if group is not None and (column - first) % group == 0:
                chosen = slice(column, column + group)
                scores = (weight_T[chosen] / factor.diagonal()[chosen, None]).square()
                scores = rank_first(scores, None if removed_T is None else removed_T[chosen])
                keep_T[chosen] = pattern.keep(scores.T.contiguous(), sparsity, Group.ROW).T
            weights = weight_T[column]
            torch.div(weights, diagonal[column], out=errors_T[column]).masked_fill_(keep_T[column], 0)
            weights.mul_(keep_T[column])
            if column + 1 < last:
                weight_T[column + 1 : last].addr_(
                    factor[column, column + 1 : last], errors_T[column], alpha=-1
                )
        if last < len(weight_T):
            weight_T[last:] -= factor[first:last, last:].T @ errors_T[first:last]
    return errors_T
