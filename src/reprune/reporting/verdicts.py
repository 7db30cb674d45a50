"""Verdicts on claims, by a rule that is fixed before the numbers are seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from scipy.stats import ttest_1samp

from reprune.errors import ConfigError, did_you_mean
from reprune.reporting.replicates import value_by_set

LEVEL = 0.95
Measure = Literal["difference", "reduction", "ratio"]
Word = Literal["holds", "does not hold", "cannot say"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One arm against another on one metric: `effect` lies above or below `threshold`.

    `arm` and `against` say which runs, as columns of the frame and their values. Per calibration set, with a and b the
    metric of `arm` and `against`: `difference` is a − b, `reduction` 1 − a/b, `ratio` a/b.
    """

    name: str
    metric: str
    arm: Mapping[str, Any]
    against: Mapping[str, Any]
    measure: Measure = "difference"
    side: Literal["above", "below"]
    threshold: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The mean effect over calibration sets, its 95 % interval (None for fewer than two sets), and what follows."""

    effect: float | None
    low: float | None
    high: float | None
    num_sets: int
    word: Word


def judge(effects: Sequence[float], side: Literal["above", "below"], threshold: float) -> Verdict:
    """The verdict on paired effects, one a calibration set.

    Student's t interval of their mean. The claim holds where the whole interval lies on its side of the threshold, does
    not where the whole lies on the other; anything else, and fewer than two sets, is "cannot say".
    """
    count = len(effects)
    if count == 0:
        return Verdict(None, None, None, 0, "cannot say")
    mean = sum(effects) / count
    if count == 1:
        return Verdict(mean, None, None, 1, "cannot say")
    if len(set(effects)) == 1:
        # Equal effects have no spread, and scipy's interval of them is NaN.
        low = high = mean
    else:
        interval = ttest_1samp(list(effects), threshold).confidence_interval(LEVEL)
        low, high = float(interval.low), float(interval.high)
    above, below = low > threshold, high < threshold
    word: Word = "cannot say"
    if above or below:
        word = "holds" if above == (side == "above") else "does not hold"
    return Verdict(mean, low, high, count, word)


def effects_of(frame: pd.DataFrame, claim: Claim) -> pd.Series:
    """The claim's effect by calibration set, of the sets that both arms have; seeds of one set are averaged first.

    ConfigError for a metric or a column that no run has.
    """
    if claim.metric not in frame:
        raise ConfigError(
            "claims", f"'{claim.name}' is about a metric that no run has", value=claim.metric,
            hint=did_you_mean(claim.metric, map(str, frame.columns)),
        )  # fmt: skip
    first, second = (value_by_set(frame, arm, claim.metric) for arm in (claim.arm, claim.against))
    pairs = pd.concat([first.rename("a"), second.rename("b")], axis=1, join="inner").dropna()
    if claim.measure == "difference":
        return pairs["a"] - pairs["b"]
    ratio = pairs["a"] / pairs["b"]
    return 1 - ratio if claim.measure == "reduction" else ratio


def verdict_table(frame: pd.DataFrame, claims: Sequence[Claim]) -> pd.DataFrame:
    """A row a claim: claim, metric, effect, low, high, sets, threshold, verdict; of the finished runs of `frame`."""
    finished = frame[frame["state"] == "finished"]
    rows = []
    for claim in claims:
        found = judge(list(effects_of(finished, claim)), claim.side, claim.threshold)
        rows.append(
            {
                "claim": claim.name,
                "metric": claim.metric,
                "measure": claim.measure,
                "effect": found.effect,
                "low": found.low,
                "high": found.high,
                "sets": found.num_sets,
                "threshold": f"{'>' if claim.side == 'above' else '<'} {claim.threshold:g}",
                "verdict": found.word,
            }
        )
    return pd.DataFrame(rows)
