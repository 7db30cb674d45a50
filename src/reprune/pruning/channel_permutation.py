"""Orders of input channels under which N:M costs less."""

from __future__ import annotations

from torch import Tensor


def spread_channels(importance: Tensor, group: int) -> Tensor:
    """An order of channels [d_in] in which each group of `group` has channels of all ranks (Zhang et al., 2024, heuristic allocation).

    The channels are ranked by `importance`; the first d_in / group of them go one to each group, the next ones in the
    opposite direction, and so on to and fro, so that sums over groups are alike.
    """
    ranks = importance.argsort(descending=True, stable=True).reshape(group, -1)
    ranks[1::2] = ranks[1::2].flip(1)
    return ranks.T.reshape(-1).contiguous()
