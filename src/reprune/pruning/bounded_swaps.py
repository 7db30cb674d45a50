"""The best swap of a kept and a pruned weight in every row, among all pairs of columns, by bounds on most of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from reprune.pruning.swap_search import SwapSearch

KEPT_MINIMA, PRUNED_MINIMA = 16, 32
"""Columns that are tried first: the lowest of so many interleaved groups. The first divides the second."""
WIDTHS = (32, 128, 512)
"""Rows with up to so many pruned candidates are gone through together."""
KEPT_TOGETHER = 16
"""Kept candidates of a row that are tried together, where its pruned ones are no more than the last of WIDTHS."""
MARGIN = 1.001
"""Room for rounding in the bounds of products."""


class AnyPair(SwapSearch):
    """Pairs of any two columns of a row, of which few are tried.

    `bounds` are an h [d_in] with |G_pr| ≤ √(h_p h_r) for all p ≠ r. With A = w² h and any t > 0, −2 w_p w_r G_pr is at
    least −t A_p − A_r / t, so that a pair's change is at least (a_p − t A_p) + (b_r − A_r / t), a sum of two parts of
    one column each. Once a change is known, only those p and r are left whose own part and the lowest of the other
    kind are below it, for t = 1/2 (`steep`) and t = 1 (`even`); they are tried in the order of their parts until no
    sum is below the best change. Nothing better is missed but by rounding.

    What counts is how alike columns are, not the rank of the Gram: of 566,000 pairs (1,536 columns, 60 % pruned, 128 or
    1,024 tokens) 500 to 5,000 were tried a swap, and 27,000 where every column had a mean larger than its deviation.
    """

    def __init__(self, weight: Tensor, keep: Tensor, barred: Tensor, gram: Tensor, bounds: Tensor) -> None:
        super().__init__(weight, keep, barred, gram)
        self.spread = weight.square() * bounds
        self.steep_leave = self.leave - 0.5 * self.spread
        self.steep_enter = self.enter - 2 * self.spread
        self.even_leave = self.leave - self.spread
        self.even_enter = self.enter - self.spread
        self.twice = 2 * weight
        self.flat_gram = gram.reshape(-1)
        self.work = [torch.empty_like(weight) for _ in range(5)]

    def swap(self, rows: Tensor, p: Tensor, r: Tensor, change: Tensor) -> None:
        super().swap(rows, p, r, change)
        for part, t, into, out in (
            (self.steep_leave, 0.5, r, p),
            (self.steep_enter, 2, p, r),
            (self.even_leave, 1, r, p),
            (self.even_enter, 1, p, r),
        ):
            part[rows, into] = self.alone[rows, into] - t * self.spread[rows, into]
            part[rows, out] = torch.inf

    def only(self, rows: Tensor) -> None:
        super().only(rows)
        for name in ("twice", "spread", "steep_leave", "steep_enter", "even_leave", "even_enter"):
            setattr(self, name, getattr(self, name)[rows])

    def best(self, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Memory that is used again: asking for it costs as much as the sums.
        if self.work[0].shape != self.weight.shape:
            self.work = [torch.empty_like(self.weight) for _ in self.work]
        pull, a, b, even_a, even_b = self.work
        torch.mul(self.twice, self.slope, out=pull)
        torch.add(self.steep_leave, pull, out=a)
        torch.sub(self.steep_enter, pull, out=b)
        torch.add(self.even_leave, pull, out=even_a)
        torch.sub(self.even_enter, pull, out=even_b)
        found = _Found(limit)
        self._first(a, b, pull, found)
        below_a, below_even_a = found.change - b.amin(dim=1), found.change - even_b.amin(dim=1)
        below_b, below_even_b = found.change - a.amin(dim=1), found.change - even_a.amin(dim=1)
        kept = _Candidates((a < below_a[:, None]).logical_and_(even_a < below_even_a[:, None]))
        pruned = _Candidates((b < below_b[:, None]).logical_and_(even_b < below_even_b[:, None]))
        fewer = 0
        for width in (*WIDTHS, a.shape[1]):
            rows = ((kept.num > 0) & (pruned.num > fewer) & (pruned.num <= width)).nonzero()[:, 0]
            fewer = width
            if len(rows) > 0:
                self._rest(rows, *kept.ordered(rows, a), *pruned.ordered(rows, b), pull, found)
        return found.change, found.p, found.r

    def _first(self, a: Tensor, b: Tensor, pull: Tensor, found: _Found) -> None:
        """Try the columns that are the lowest of some groups, by their own parts."""
        p, r = _minima(a, KEPT_MINIMA), _minima(b, PRUNED_MINIMA)
        own_a = self.leave.gather(1, p) + pull.gather(1, p)
        own_b = self.enter.gather(1, r) - pull.gather(1, r)
        change = self._changes(p, r, self.weight.gather(1, p), self.weight.gather(1, r), own_a, own_b)
        found.improve(torch.arange(len(p), device=p.device), change, p, r)

    def _rest(
        self,
        rows: Tensor,
        p: Tensor,
        bound_p: Tensor,
        r: Tensor,
        bound_r: Tensor,
        pull: Tensor,
        found: _Found,
    ) -> None:
        """Try the candidates of some rows, [len(rows), …] in the order of their bounds, until none can be better."""
        w_p, w_r = _at(self.weight, rows, p), _at(self.weight, rows, r)
        a = (_at(self.leave, rows, p) + _at(pull, rows, p)).masked_fill_(bound_p == torch.inf, torch.inf)
        b = (_at(self.enter, rows, r) - _at(pull, rows, r)).masked_fill_(bound_r == torch.inf, torch.inf)
        together = max(1, KEPT_TOGETHER * WIDTHS[-1] // max(WIDTHS[-1], r.shape[1]))
        todo = torch.arange(len(rows), device=rows.device)
        for first in range(0, p.shape[1], together):
            room = found.change[rows[todo]] - bound_p[todo, first]
            some = bound_r[todo, 0] < room
            todo, room = todo[some], room[some]
            if len(todo) == 0:
                break
            num = int((bound_r[todo] < room[:, None]).sum(dim=1).max())
            now = slice(first, first + together)
            columns_p, columns_r = p[todo, now], r[todo, :num]
            change = self._changes(
                columns_p, columns_r, w_p[todo, now], w_r[todo, :num], a[todo, now], b[todo, :num]
            )
            found.improve(rows[todo], change, columns_p, columns_r)

    def _changes(self, p: Tensor, r: Tensor, w_p: Tensor, w_r: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """What the swaps of all p [rows, P] and r [rows, R] change, [rows, P, R]."""
        places = (p * len(self.gram))[:, :, None] + r[:, None, :]
        change = self.flat_gram.index_select(0, places.view(-1)).view(places.shape)
        change *= (-2 * w_p)[:, :, None]
        change *= w_r[:, None, :]
        change += b[:, None, :]
        change += a[:, :, None]
        return change


def filled_up(
    weight: Tensor, keep: Tensor, barred: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with columns of zeros behind the last one, as AnyPair needs them; these can be in no swap."""
    if more := -weight.shape[1] % PRUNED_MINIMA:
        weight, gram = pad(weight, (0, more)), pad(gram, (0, more, 0, more))
        keep, barred = pad(keep, (0, more)), pad(barred, (0, more), value=True)
    return weight, keep, barred, gram.contiguous()


def room_for_pairs(d_in: int) -> int:
    """Pairs of a row that are tried together at most."""
    return max(KEPT_TOGETHER * WIDTHS[-1], d_in)


class _Found:
    """The best swaps so far."""

    def __init__(self, limit: Tensor) -> None:
        self.change = limit.clone()
        self.p = torch.zeros_like(limit, dtype=torch.long)
        self.r = torch.zeros_like(self.p)

    def improve(self, rows: Tensor, change: Tensor, p: Tensor, r: Tensor) -> None:
        """Take note of what is better among `change` [len(rows), P, R], the swaps of p [len(rows), P] and r."""
        lowest = change.flatten(1).amin(dim=1)
        better = (lowest < self.change[rows]).nonzero()[:, 0]
        which = change[better].flatten(1).argmin(dim=1)
        rows = rows[better]
        self.change[rows] = lowest[better]
        self.p[rows] = p[better, which // r.shape[1]]
        self.r[rows] = r[better, which % r.shape[1]]


class _Candidates:
    """Columns of every row that may be of a better swap: `num` of them [rows]."""

    def __init__(self, chosen: Tensor) -> None:
        self.row, self.column = chosen.nonzero(as_tuple=True)
        self.num = torch.bincount(self.row, minlength=len(chosen))
        self.start = self.num.cumsum(0) - self.num

    def ordered(self, rows: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of some rows by ascending bound, [len(rows), most that any has], and their bounds: infinite behind the last."""
        num = self.num[rows]
        width = int(num.max())
        behind = torch.arange(width, device=rows.device) >= num[:, None]
        places = (self.start[rows][:, None] + torch.arange(width, device=rows.device)).masked_fill_(behind, 0)
        columns = self.column[places]
        listed = _at(bounds, rows, columns).masked_fill_(behind, torch.inf)
        listed, order = listed.sort(dim=1, stable=True)
        return columns.gather(1, order), listed


def _minima(parts: Tensor, num_groups: int) -> Tensor:
    """The column with the lowest entry of every group of interleaved columns, [rows, num_groups]."""
    _, place = parts.view(len(parts), -1, num_groups).min(dim=1)
    return place * num_groups + torch.arange(num_groups, device=parts.device)


def _at(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """values[rows[i], columns[i, j]]."""
    places = columns + (rows * values.shape[1])[:, None]
    return values.view(-1).index_select(0, places.view(-1)).view(places.shape)


def product_bounds(gram: Tensor) -> Tensor:
    """Some h [d_in] with |G_pr| ≤ √(h_p h_r) for all p ≠ r: h_p = max_r |G_pr| √(G_pp / G_rr), and a little more.

    It is G_pp times the largest cosine of column p and another one.
    """
    root = gram.diagonal().clamp(min=0).sqrt().clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
    bounds = torch.empty_like(root)
    for first in range(0, len(gram), 1024):
        part = (gram[first : first + 1024] / root).abs_()
        part.diagonal(first).zero_()
        bounds[first : first + 1024] = part.amax(dim=1)
    return bounds * root * MARGIN
