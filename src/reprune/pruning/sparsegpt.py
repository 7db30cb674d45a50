"""Pruner `sparsegpt` (Frantar & Alistarh, 2023, arXiv 2301.00774)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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

    H is never inverted. With H = U Uᵀ, U = C⁻¹ upper, and D = W − Ŵ in the columns before block b, all errors so far
    make of the block W_b + D U_:,b C_bb, where C_bb = U_bb⁻¹ is only as large as the block.
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
        [pruned] = self.prune_together([layer], pattern, [sparsity])
        return pruned

    def prune_together(
        self, layers: Sequence[LayerContext], pattern: Pattern, sparsities: Sequence[float]
    ) -> list[Pruned]:
        """See JointPruner: one sweep over the rows of all layers, masks by layer."""
        self.check(pattern)
        inputs, names = layers[0].inputs, ", ".join(layer.name for layer in layers)
        upper, notes = inputs.factor(self.damp, f"block {layers[0].block}, layer {names}")
        # A copy in any case: the transpose of a weight that is stored transposed is contiguous as it is.
        change_T = torch.cat([layer.weight.T.float() for layer in layers], dim=1).contiguous()
        change_T[inputs.dead] = 0
        weight_T = torch.empty_like(change_T)
        keep_T = torch.ones_like(change_T, dtype=torch.bool)
        choice = _Choice(layers, pattern, sparsities)
        for start in range(0, len(upper), self.block_size):
            block = slice(start, start + self.block_size)
            inner = upper[block, block]
            identity = torch.eye(len(inner), device=inner.device)
            factor = torch.linalg.solve_triangular(inner, identity, upper=True)
            torch.addmm(
                change_T[block],
                factor.T,
                upper[:start, block].T @ change_T[:start],
                out=weight_T[block],
            )
            _sweep(weight_T[block], keep_T[block], factor, choice, start)
            # What was the dense weight becomes what is gone from it.
            change_T[block] -= weight_T[block]
        found, end = [], 0
        for layer in layers:
            own = slice(end, end := end + len(layer.weight))
            require_finite(weight_T[:, own], layer)
            weight = weight_T[:, own].T.to(layer.weight.dtype).contiguous()
            found.append(Pruned(weight, keep_T[:, own].T.contiguous(), notes))
        return found


@dataclass(frozen=True)
class _Choice:
    """Masks of layers whose rows lie beside one another, each layer's from its own scores."""

    layers: Sequence[LayerContext]
    pattern: Pattern
    sparsities: Sequence[float]

    def write(self, keep_T: Tensor, scores_T: Tensor, first: int) -> None:
        """The masks of the columns from `first` on; both [columns, rows of all layers]."""
        end = 0
        for layer, sparsity in zip(self.layers, self.sparsities, strict=True):
            own = slice(end, end := end + len(layer.weight))
            scores = scores_T[:, own]
            if self.pattern.columns is None:
                require_finite(scores, layer)
            if layer.removed is not None:
                scores = rank_first(scores, layer.removed.T[first : first + len(scores)])
            if self.pattern.columns is None:
                keep_T[:, own] = self.pattern.keep(scores, sparsity, Group.MATRIX)
            else:
                keep_T[:, own] = self.pattern.keep(scores.T.contiguous(), sparsity, Group.ROW).T


def _sweep(weight_T: Tensor, keep_T: Tensor, factor: Tensor, choice: _Choice, start: int) -> None:
    """Go through one block's columns, from `start` on, in order, changing `weight_T` and `keep_T` [columns, rows] in place.

    Updates reach a few columns at once, and the next few by one product.
    """
    group = choice.pattern.columns
    step = SWEEP_COLUMNS if group is None else group * max(1, SWEEP_COLUMNS // group)
    diagonal = factor.diagonal()[:, None]
    # 1/C_jj where a weight goes, zero where it stays; from its column's turn on, the error that it leaves.
    errors_T = torch.empty_like(weight_T)

    def decide(first: int, last: int) -> None:
        some = slice(first, last)
        choice.write(keep_T[some], (weight_T[some] / diagonal[some]).square_(), start + first)
        # Bytes become numbers several times as fast as truth values do.
        errors_T[some].copy_((~keep_T[some]).view(torch.uint8)).div_(diagonal[some])

    if group is None:
        decide(0, len(weight_T))
    for first in range(0, len(weight_T), step):
        last = min(first + step, len(weight_T))
        few_T = weight_T[first:last]
        few_T.addmm_(factor[:first, first:last].T, errors_T[:first], alpha=-1)
        # Zeros up to the diagonal: an update of all of the few columns costs less than taking the later ones out.
        later = factor[first:last, first:last].triu(1)
        for column, (weights, errors, row) in enumerate(zip(few_T, errors_T[first:last], later, strict=True)):
            if group is not None and column % group == 0:
                decide(first + column, first + column + group)
            errors.mul_(weights)
            few_T.addr_(row, errors, alpha=-1)
    # Filling where a mask says so takes several times as long as a product.
    weight_T.mul_(errors_T.copy_(keep_T.view(torch.uint8)))
