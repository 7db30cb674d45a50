"""Refinement `sparse_swaps` (Zimmer et al., 2025, arXiv 2512.10922)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.errors import require_nonnegative, require_positive
from reprune.pruning.contract import LayerContext, Needs, require_finite
from reprune.sparsity.patterns import Pattern

CHUNK_BYTES = 256 * 2**20
CANDIDATES = 16
"""Kept weights of a row that are tried together against all pruned ones."""


@dataclass(kw_only=True)
class SparseSwaps:
    """Best 1-swaps: in every row, again and again, the swap of a kept and a pruned weight that lowers ‖(W − M⊙W)X‖² most.

    With e = (1 − m)⊙w, c = G e and G = Σ x xᵀ, removing p and bringing back r changes the row's loss eᵀGe by

        a_p + b_r − 2 w_p w_r G_pr,   a_p = 2 w_p c_p + w_p² G_pp,   b_r = −2 w_r c_r + w_r² G_rr,

    after which c changes by w_p G_p − w_r G_r. A row is done when no swap lowers its loss by more than `tolerance` of
    it, or after `max_swaps`. With a pattern that has groups of columns both weights are of
    one group. Rows need not have equal counts: each keeps its own.

    Not every pair is looked at where the result is the same: a_p less the most that its product with a pruned weight
    can take off bounds all pairs of p from below, and kept weights are tried in the order of that bound.
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
        weight = layer.weight.float()
        barred = torch.zeros_like(keep) if layer.removed is None else layer.removed
        # What a row needs at a time: the pairs of its candidates, and a copy on the way to them.
        pairs = weight.shape[1] * (CANDIDATES if pattern.columns is None else pattern.columns)
        rows = max(1, CHUNK_BYTES // (2 * weight.element_size() * pairs))
        found = torch.empty_like(keep)
        for first in range(0, len(weight), rows):
            some = slice(first, first + rows)
            found[some] = self._refine_rows(
                layer, weight[some], keep[some], barred[some], gram, pattern.columns
            )
        return found

    def _refine_rows(
        self,
        layer: LayerContext,
        weight: Tensor,
        keep: Tensor,
        barred: Tensor,
        gram: Tensor,
        group: int | None,
    ) -> Tensor:
        """The refined mask of some rows."""
        keep = keep.clone()
        error = weight.masked_fill(keep, 0)
        slope = error @ gram
        require_finite(slope, layer)
        loss = (error * slope).sum(dim=1)
        alone = weight.square() * gram.diagonal()
        reach = _reach(weight, ~(keep | barred), gram) if group is None else None
        blocks = None if group is None else _diagonal_blocks(gram, group)
        rows = torch.arange(len(weight), device=weight.device)
        for _ in range(self.max_swaps):
            w, kept = weight[rows], keep[rows]
            twice = 2 * w * slope[rows]
            leave = (alone[rows] + twice).masked_fill(~kept, torch.inf)
            enter = (alone[rows] - twice).masked_fill(kept | barred[rows], torch.inf)
            # The sum of a singular Gram may come out below zero, which would make room for worse masks.
            limit = -self.tolerance * loss[rows].clamp(min=0)
            if blocks is not None:
                change, p, r = _best_in_groups(w, leave, enter, blocks)
            else:
                assert reach is not None
                change, p, r = _best(w, leave, enter, gram, reach[rows], limit)
            lower = change < limit
            rows, p, r = rows[lower], p[lower], r[lower]
            if len(rows) == 0:
                break
            keep[rows, p], keep[rows, r] = False, True
            w_p, w_r = weight[rows, p, None], weight[rows, r, None]
            slope[rows] += w_p * gram[p] - w_r * gram[r]
            loss[rows] += change[lower]
            if reach is not None:
                # p may come back from now on.
                reach[rows] = torch.maximum(reach[rows], 2 * weight[rows] * w_p * gram[p])
        return keep


def _reach(weight: Tensor, back: Tensor, gram: Tensor) -> Tensor:
    """The most that 2 w_p w_r G_pr comes to over all r in `back`, at least 0, of every p: [rows, d_in]."""
    others = weight.masked_fill(~back, 0)
    found = torch.empty_like(weight)
    for first in range(0, weight.shape[1], CANDIDATES):
        part = slice(first, first + CANDIDATES)
        products = others[:, None, :] * gram[part]
        products *= weight[:, part, None]
        found[:, part] = products.amax(dim=2)
    return found.mul_(2).clamp_(min=0)


def _best(
    weight: Tensor, leave: Tensor, enter: Tensor, gram: Tensor, reach: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest change of every row, and which columns p and r it swaps; `limit` where none is below it."""
    best, p, r = (
        limit.clone(),
        torch.zeros_like(limit, dtype=torch.long),
        torch.zeros_like(limit, dtype=torch.long),
    )
    lowest = enter.amin(dim=1)
    bound, order = (leave - reach).sort(dim=1, stable=True)
    todo = torch.arange(len(weight), device=weight.device)
    for first in range(0, weight.shape[1], CANDIDATES):
        todo = todo[bound[todo, first] + lowest[todo] < best[todo]]
        if len(todo) == 0:
            break
        columns = order[todo, first : first + CANDIDATES]
        w = weight[todo]
        pairs = gram[columns]
        pairs *= -2 * w.gather(1, columns)[:, :, None]
        pairs *= w[:, None, :]
        pairs += enter[todo][:, None, :]
        change, place = pairs.min(dim=2)
        change, which = (change + leave[todo].gather(1, columns)).min(dim=1)
        better = change < best[todo]
        found, which = todo[better], which[better, None]
        best[found] = change[better]
        p[found] = columns[better].gather(1, which)[:, 0]
        r[found] = place[better].gather(1, which)[:, 0]
    return best, p, r


def _best_in_groups(
    weight: Tensor, leave: Tensor, enter: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest change of every row over pairs of one group, and which columns p and r it swaps."""
    num_groups, group, _ = blocks.shape
    shape = (-1, num_groups, group)
    w = weight.reshape(shape)
    pairs = w[:, :, :, None] * blocks
    pairs *= -2 * w[:, :, None, :]
    pairs += leave.reshape(shape)[:, :, :, None]
    pairs += enter.reshape(shape)[:, :, None, :]
    change, place = pairs.flatten(1).min(dim=1)
    start = place // group**2 * group
    return change, start + place % group**2 // group, start + place % group


def _diagonal_blocks(gram: Tensor, group: int) -> Tensor:
    """The blocks of the Gram on its diagonal, [groups, group, group]."""
    num_groups = len(gram) // group
    each = torch.arange(num_groups, device=gram.device)
    return gram.reshape(num_groups, group, num_groups, group)[each, :, each, :]
