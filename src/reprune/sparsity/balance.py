"""From what an allocation wishes to shares in [0, 1) that keep the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from scipy.optimize import brentq

MOST = 0.99
"""The largest share that a wish gives a layer, so that none is emptied: round half up makes 1 − 1e-6 of 576 all of them."""

Numbers = Mapping[str, float]
Counts = Mapping[str, int]


def shifted(wished: Numbers, num_weights: Counts, sparsity: float) -> dict[str, float]:
    """clip(s_l + c) to [0, 1), with the one c by which the mean weighted by `num_weights` is `sparsity`."""
    low, high = -max(wished.values()), 1 - min(wished.values())
    return met(lambda c: {name: s + c for name, s in wished.items()}, low, high, num_weights, sparsity)


def scaled(wished: Numbers, num_weights: Counts, sparsity: float) -> dict[str, float]:
    """clip(c · s_l) for wishes s_l ≥ 0, with the one c by which the weighted mean is `sparsity`.

    Layers that wish nothing get nothing while the others can meet the budget; else they share the rest alike.
    """
    idle = {name for name, wish in wished.items() if not wish > 0}
    rest, cap = sum(num_weights[name] for name in idle), max(MOST, sparsity)
    others = sum(num_weights.values()) - rest
    left = sparsity * (rest + others) - cap * others
    if idle and left > 0:
        return {name: min(left / rest, cap) if name in idle else cap for name in wished}
    most = _reciprocal(wished)
    return met(lambda c: {name: c * s for name, s in wished.items()}, 0.0, most, num_weights, sparsity)


def dense_in_proportion(wished: Numbers, num_weights: Counts, sparsity: float) -> dict[str, float]:
    """1 − clip(c · d_l) for densities d_l > 0, with the one c by which the weighted mean is `sparsity`."""
    most = _reciprocal(wished)
    return met(lambda c: {name: 1 + c * d for name, d in wished.items()}, -most, 0.0, num_weights, sparsity)


def _reciprocal(wished: Numbers) -> float:
    """The factor by which even the smallest positive wish reaches 1."""
    return 1 / min((value for value in wished.values() if value > 0), default=1.0)


def met(
    shares: Callable[[float], dict[str, float]],
    low: float,
    high: float,
    num_weights: Counts,
    sparsity: float,
    most: float = MOST,
) -> dict[str, float]:
    """The shares, clipped to [0, `most`] (or `sparsity`, if that is more), whose weighted mean is `sparsity`.

    `shares` rise with their argument, from too low at `low` to too high at `high`.
    """
    total, cap = sum(num_weights.values()), max(most, sparsity)

    def clipped(c: float) -> dict[str, float]:
        return {name: min(max(share, 0.0), cap) for name, share in shares(c).items()}

    def excess(c: float) -> float:
        return sum(share * num_weights[name] for name, share in clipped(c).items()) / total - sparsity

    if excess(low) >= 0:
        return clipped(low)
    if excess(high) <= 0:
        return clipped(high)
    return clipped(float(brentq(excess, low, high, xtol=1e-15, rtol=1e-14)))
