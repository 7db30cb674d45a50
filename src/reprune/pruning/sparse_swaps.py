"""Refinement `sparse_swaps` (Zimmer et al., 2025, arXiv 2512.10922)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.errors import require_nonnegative, require_positive
from reprune.pruning.bounded_swaps import AnyPair, filled_up, product_bounds, room_for_pairs
from reprune.pruning.contract import LayerContext, Needs, require_finite
from reprune.pruning.swap_search import InGroups, SwapSearch
from reprune.sparsity.patterns import Pattern

CHUNK_BYTES = 256 * 2**20
ENDED = 0.2
"""Rows that are done are left out when they are more than this share; before that they are carried along."""


@dataclass(kw_only=True)
class SparseSwaps:
    """Best 1-swaps: in every row, again and again, the swap of a kept and a pruned weight that lowers ‖(W − M⊙W)X‖² most.

    With e = (1 − m)⊙w, c = G e and G = Σ x xᵀ, removing p and bringing back r changes the row's loss eᵀGe by

        a_p + b_r − 2 w_p w_r G_pr,   a_p = 2 w_p c_p + w_p² G_pp,   b_r = −2 w_r c_r + w_r² G_rr,

    after which c changes by w_p G_p − w_r G_r. A row is done when no swap lowers its loss by more than `tolerance` of
    it, or after `max_swaps`. With a pattern that has groups of columns both weights are of
    one group. Rows need not have equal counts: each keeps its own.

    Every swap is the best of all pairs, to rounding, though few of them are tried (see AnyPair).
    """

    max_swaps: int = 100
    tolerance: float = 1e-6

    needs: ClassVar[Needs] = Needs(gram=True)

    def __post_init__(self) -> None:
        require_positive(max_swaps=self.max_swaps)
        require_nonnegative(tolerance=self.tolerance)

    @torch.no_grad()
    def refine(self, layer: LayerContext, keep: Tensor, pattern: Pattern) -> Tensor:
        """See Refinement."""
        gram = layer.inputs.gram
        assert gram is not None
        barred = torch.zeros_like(keep) if layer.removed is None else layer.removed
        found = torch.empty_like(keep)
        for some, search in _searches(layer.weight.float(), keep, barred, gram, pattern.columns):
            require_finite(search.slope, layer)
            found[some] = self._refine_rows(search, keep[some])
        return found

    def _refine_rows(self, search: SwapSearch, keep: Tensor) -> Tensor:
        """The refined mask of some rows."""
        keep = keep.clone()
        number = torch.arange(len(keep), device=keep.device)
        going = torch.ones_like(number, dtype=torch.bool)
        for _ in range(self.max_swaps):
            # The sum of a singular Gram may come out below zero, which would make room for worse masks.
            limit = -self.tolerance * search.loss.clamp(min=0)
            change, p, r = search.best(limit)
            going &= change < limit
            rows = going.nonzero()[:, 0]
            if len(rows) == 0:
                break
            p, r, change = p[rows], r[rows], change[rows]
            keep[number[rows], p], keep[number[rows], r] = False, True
            search.swap(rows, p, r, change)
            if len(rows) < (1 - ENDED) * len(going):
                search.only(rows)
                number, going = number[rows], going[rows]
        return keep


def _searches(
    weight: Tensor, keep: Tensor, barred: Tensor, gram: Tensor, group: int | None
) -> Iterator[tuple[slice, SwapSearch]]:
    """A search for every few rows, as many as CHUNK_BYTES have room for; over pairs within groups of columns or (None) any.

    `weight`, `keep` and `barred`, what may not come back, are [d_out, d_in], `gram` [d_in, d_in].
    """
    num_rows, d_in = weight.shape
    if group is None:
        weight, keep, barred, gram = filled_up(weight, keep, barred, gram)
        bounds = product_bounds(gram)
        # A pair that is tried has its place in the Gram, the place's copy and the change; the rest is by column.
        row_bytes = 24 * room_for_pairs(d_in) + 80 * d_in
    else:
        row_bytes = 8 * d_in * group + 40 * d_in
    for first in range(0, num_rows, max(1, CHUNK_BYTES // row_bytes)):
        some = slice(first, first + max(1, CHUNK_BYTES // row_bytes))
        parts = weight[some].contiguous(), keep[some], barred[some], gram
        yield some, AnyPair(*parts, bounds) if group is None else InGroups(*parts, group)
