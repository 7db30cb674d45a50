"""How far a mean over windows would move with other windows: evaluation noise, nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from reprune.seeding import seed_for

RESAMPLES = 2000
LEVEL = 0.95
_VALUES_A_BATCH = 2**22

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Noise:
    """The standard error of a number, and the ends of its percentile interval at LEVEL."""

    standard_error: float
    low: float
    high: float


def noise_of_ratio(
    sums: Array, counts: Array, transform: Callable[[Array], Array] = lambda values: values
) -> Noise | None:
    """Percentile bootstrap of `transform(Σ sums / Σ counts)` over windows (or other units that are drawn as wholes).

    `sums` and `counts` hold a value a unit. None for a single unit, which says nothing of others, and where a resample
    could be too large for a number. As many units give the same resamples whatever they hold, so that the noise of two
    runs is that of the same draws. The windows are those of one text: what another calibration set or another text
    would change is not in it.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    with np.errstate(over="ignore"):
        highest = transform((sums / counts).max(keepdims=True))
    if len(sums) < 2 or not np.isfinite(highest).all():
        return None

    def ratio(sums: Array, counts: Array, axis: int = -1) -> Array:
        return transform(sums.sum(axis=axis) / counts.sum(axis=axis))

    found = bootstrap(
        (sums, counts),
        ratio,
        n_resamples=RESAMPLES,
        batch=max(1, _VALUES_A_BATCH // len(sums)),
        vectorized=True,
        paired=True,
        axis=-1,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed_for(0, "bootstrap over windows")),
    )
    interval = found.confidence_interval
    return Noise(float(found.standard_error), float(interval.low), float(interval.high))
