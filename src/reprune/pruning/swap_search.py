"""The best swap of a kept and a pruned weight in every row: what every search for it keeps, and the one within groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class SwapSearch(ABC):
    """Some rows, their masks, and the swap of each that lowers its loss eᵀGe most, e = (1 − m)⊙w.

    Swapping the kept p for the pruned r changes a row's loss by a_p + b_r − 2 w_p w_r G_pr, with a_p = w_p² G_pp + 2 w_p c_p,
    b_r = w_r² G_rr − 2 w_r c_r and c = Ge. All tensors are float32 [rows, d_in]; `slope` is c. `leave` and `enter` are
    the terms without c, infinite where a weight may not leave or enter.
    """

    def __init__(self, weight: Tensor, keep: Tensor, barred: Tensor, gram: Tensor) -> None:
        self.gram = gram
        self.weight = weight
        error = weight.masked_fill(keep, 0)
        self.slope = error @ gram
        self.loss = (error * self.slope).sum(dim=1)
        self.alone = weight.square() * gram.diagonal()
        self.leave = self.alone.masked_fill(~keep, torch.inf)
        self.enter = self.alone.masked_fill(keep | barred, torch.inf)

    @abstractmethod
    def best(self, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The lowest change of every row and the columns p and r that make it, [rows] each; without meaning where it is not below `limit`."""

    def swap(self, rows: Tensor, p: Tensor, r: Tensor, change: Tensor) -> None:
        """Make one swap in each of `rows`."""
        self.leave[rows, r], self.leave[rows, p] = self.alone[rows, r], torch.inf
        self.enter[rows, p], self.enter[rows, r] = self.alone[rows, p], torch.inf
        self.loss[rows] += change
        w_p, w_r = self.weight[rows, p, None], self.weight[rows, r, None]
        step = self.gram.index_select(0, p).mul_(w_p)
        self.slope.index_add_(0, rows, step.sub_(self.gram.index_select(0, r).mul_(w_r)))

    def only(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        for name in ("weight", "slope", "loss", "alone", "leave", "enter"):
            setattr(self, name, getattr(self, name)[rows])


class InGroups(SwapSearch):
    """Pairs of columns that are of one group of `group` consecutive ones."""

    def __init__(self, weight: Tensor, keep: Tensor, barred: Tensor, gram: Tensor, group: int) -> None:
        super().__init__(weight, keep, barred, gram)
        num_groups = len(gram) // group
        each = torch.arange(num_groups, device=gram.device)
        self.blocks = gram.reshape(num_groups, group, num_groups, group)[each, :, each, :]

    def best(self, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_groups, group, _ = self.blocks.shape
        shape = (-1, num_groups, group)
        pull = 2 * self.weight * self.slope
        w = self.weight.reshape(shape)
        change = w[:, :, :, None] * self.blocks
        change *= -2 * w[:, :, None, :]
        change += (self.leave + pull).reshape(shape)[:, :, :, None]
        change += (self.enter - pull).reshape(shape)[:, :, None, :]
        lowest, place = change.flatten(1).min(dim=1)
        start = place // group**2 * group
        return lowest, start + place % group**2 // group, start + place % group
