"""Orders of input channels under which N:M costs less (Zhang et al., 2024, "Plug-and-Play", ICLR 2024)."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CHUNK_BYTES = 64 * 2**20


def spread_channels(importance: Tensor, group: int) -> Tensor:
    """An order of channels [d_in] in which each group of `group` has channels of all ranks: the paper's heuristic allocation.

    The channels are ranked by `importance`; the first d_in / group of them go one to each group, the next ones in the
    opposite direction, and so on to and fro, so that sums over groups are alike.
    """
    ranks = importance.argsort(descending=True, stable=True).reshape(group, -1)
    ranks[1::2] = ranks[1::2].flip(1)
    return ranks.T.reshape(-1).contiguous()


def assign_channels(scores: Tensor, order: Tensor, group: int, kept: int) -> Tensor:
    """The order with the channels of one position of every group assigned anew to the groups, position by position.

    `scores` are not negative, [d_out, d_in]; a group of `group` channels of `order` [d_in] retains its `kept` highest
    of each output. For one position at a time the channels there are given to the groups so that the sum of what is
    retained is the highest (the paper's linear sum assignment), so that it never falls; every position has one turn, as
    in the paper's code. The result depends on the scores alone.
    """
    groups = order.reshape(-1, group)
    if not 0 < kept < group:
        return order.clone()
    for position in range(group):
        groups = assign_position(scores, groups, position, kept)
    return groups.reshape(-1)


def assign_position(scores: Tensor, groups: Tensor, position: int, kept: int) -> Tensor:
    """The groups [d_in / group, group] with the channels at `position` given to the groups that retain most with them."""
    others = groups[:, [other for other in range(groups.shape[1]) if other != position]]
    # A group retains its kept − 1 highest others, and the channel or the next other: of these, whichever is higher.
    next_other = scores[:, others].sort(dim=2, descending=True).values[:, :, kept - 1]
    retained = _sums_of_higher(scores[:, groups[:, position]], next_other)
    channel, to = linear_sum_assignment(retained.cpu().numpy(), maximize=True)
    assigned = torch.empty(len(groups), dtype=torch.long)
    assigned[torch.from_numpy(to)] = torch.from_numpy(channel)
    groups = groups.clone()
    groups[:, position] = groups[assigned.to(groups.device), position]
    return groups


def retained_score(scores: Tensor, order: Tensor, group: int, kept: int) -> float:
    """The sum of the `kept` highest scores of every output in every group of `group` channels of `order`."""
    grouped = scores[:, order].reshape(len(scores), -1, group)
    return float(grouped.topk(kept, dim=2).values.sum(dtype=torch.float64))


def _sums_of_higher(one: Tensor, other: Tensor) -> Tensor:
    """Σ_i max(one_ia, other_ib), float64 [a, b]."""
    num_rows, width = other.shape
    found = torch.empty(one.shape[1], width, dtype=torch.float64, device=one.device)
    step = max(1, CHUNK_BYTES // (num_rows * width * one.element_size()))
    for first in range(0, one.shape[1], step):
        part = torch.maximum(one[:, first : first + step, None], other[:, None, :])
        found[first : first + step] = part.sum(dim=0, dtype=torch.float64)
    return found
