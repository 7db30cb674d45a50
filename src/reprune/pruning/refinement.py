"""The contract of a refinement: a better mask of the same counts, whatever method chose the first one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reprune.pruning.contract import LayerContext, Needs, Pruned, Pruner
from reprune.sparsity.patterns import Pattern


class Refinement(Protocol):
    """Swaps kept weights for pruned ones of the same row, and of the same group of columns where the pattern has such."""

    needs: Needs

    def refine(self, layer: LayerContext, keep: Tensor, pattern: Pattern) -> Tensor:
        """Another keep mask, bool [d_out, d_in], with as many kept in every row (and group) as `keep` has.

        `layer.weight` are the weights before anything was pruned. What `layer.removed` names stays removed. RunError,
        naming the layer, when it cannot be done.
        """
        ...


@dataclass(kw_only=True)
class Unrefined:
    """The mask as the method chose it: `refine=none`, for grids; the same run as one without `refine`."""


def needs_of(pruner: Pruner, refinement: Refinement | None) -> Needs:
    """What a method reads, with what a refinement of its masks reads."""
    return pruner.needs if refinement is None else pruner.needs | refinement.needs


def reads_apart(pruner: Pruner, refinement: Refinement | None) -> bool:
    """Whether a refinement needs statistics of its own, because the pruner's leave text out."""
    return refinement is not None and refinement.needs.any and pruner.needs.statistics_without is not None


def refined(refinement: Refinement, layer: LayerContext, pruned: Pruned, pattern: Pattern) -> Pruned:
    """The pruned layer with its mask refined; what stays has the values it had before it was pruned.

    A refinement judges swaps by these, and what a method like SparseGPT made of the weights belongs to its own mask:
    kept under another it makes the layer's error larger. Least squares (`reconstruction=least_squares`) fits them anew.
    """
    keep = refinement.refine(layer, pruned.keep, pattern)
    assert keep.shape == pruned.keep.shape
    assert bool((keep.sum(dim=1) == pruned.keep.sum(dim=1)).all()), "a refinement swaps weights within a row"
    swapped = int((keep & ~pruned.keep).sum())
    weight = torch.where(keep, layer.weight, 0)
    return Pruned(weight, keep, pruned.notes, {**pruned.facts, "swapped": swapped})
