"""Verdicts on claims, by a rule that is fixed before the numbers are seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from reprune.reporting.replicates import arm_names, chosen, metric_of, set_keys, value_by_set

LEVEL = 0.95
FEWEST_ARMS = 3
EXPERIMENTS = "choice/experiments"
Side = Literal["above", "below"]
Measure = Literal["difference", "reduction", "ratio"]
Word = Literal["holds", "does not hold", "cannot say"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One arm against another on one metric: `effect` lies above or below `threshold`.

    `arm` and `against` say which runs, as columns of the frame and their values. Per calibration set, with a and b the
    metric of `arm` and `against`: `difference` is a − b, `reduction` 1 − a/b, `ratio` a/b. With `between`, a column, a and
    b are ln(largest ÷ smallest) of the metric between the values of that column, e.g. how far pruners are apart.
    A metric with `*` is a geometric mean: see `replicates.metric_of`.
    """

    name: str
    metric: str
    arm: Mapping[str, Any]
    against: Mapping[str, Any]
    measure: Measure = "difference"
    between: str | None = None
    side: Side
    threshold: float = 0.0

    @property
    def arms(self) -> tuple[Mapping[str, Any], ...]:
        """Which runs it speaks of."""
        return self.arm, self.against

    def effects(self, frame: pd.DataFrame) -> pd.Series:
        """The effect by calibration set, of the sets that both arms have; seeds of one set are averaged first.

        ConfigError for a metric or a column that no run has.
        """
        first, second = self._values(frame)
        pairs = pd.concat([first.rename("a"), second.rename("b")], axis=1, join="inner").dropna()
        if self.measure == "difference":
            return pairs["a"] - pairs["b"]
        ratio = pairs["a"] / pairs["b"]
        return 1 - ratio if self.measure == "reduction" else ratio

    def _values(self, frame: pd.DataFrame) -> list[pd.Series]:
        """The metric, or its spread, of `arm` and of `against` by calibration set."""
        if self.between is None:
            return [value_by_set(frame, arm, self.metric) for arm in self.arms]
        # Of the same kinds in both: one that is missing in one of them would make its spread the smaller one.
        kinds = sorted(
            {kind for arm in self.arms for kind in chosen(frame, arm, self.between)[self.between].dropna()}
        )
        each = [
            [value_by_set(frame, {**arm, self.between: kind}, self.metric).rename(kind) for kind in kinds]
            for arm in self.arms
        ]
        if len(kinds) < 2:
            return [pd.Series(dtype=float)] * 2
        values = [pd.concat(kind, axis=1, join="inner").dropna() for kind in each]
        return [(value.max(axis=1) / value.min(axis=1)).apply(np.log) for value in values]


@dataclass(frozen=True, kw_only=True)
class RankClaim:
    """One metric ranks runs as another does: Spearman's ρ over the arms of a calibration set, above or below `threshold`.

    `among` says which runs are ranked, as columns and values. With `rather_than`, another metric, the effect is by how
    much ρ of `metric` is larger than ρ of that one.
    """

    name: str
    metric: str
    ranks_as: str
    among: Mapping[str, Any]
    rather_than: str | None = None
    side: Side
    threshold: float = 0.0

    @property
    def arms(self) -> tuple[Mapping[str, Any], ...]:
        """Which runs it speaks of."""
        return (self.among,)

    @property
    def measure(self) -> str:
        """What the effect is, in words."""
        return "rank correlation" if self.rather_than is None else "difference of rank correlations"

    def effects(self, frame: pd.DataFrame) -> pd.Series:
        """The effect by calibration set, of the sets that have every arm, three or more; seeds of one are averaged first.

        ConfigError for a metric or a column that no run has.
        """
        runs = chosen(frame, self.among)
        names = [name for name in (self.metric, self.ranks_as, self.rather_than) if name is not None]
        values = pd.DataFrame({name: metric_of(runs, name) for name in names}).dropna()
        keys = set_keys(runs)
        arms = arm_names(runs).loc[values.index]
        found = {}
        for number, group in values.groupby([runs.loc[values.index, key] for key in keys], dropna=False):
            each = group.groupby(arms.loc[group.index]).mean()
            # Sets of a sweep that is not through would rank fewer arms than others.
            if len(each) == arms.nunique() >= FEWEST_ARMS:
                rho = each.corr(method="spearman")[self.ranks_as]
                found[number] = rho[self.metric] - (rho[self.rather_than] if self.rather_than else 0.0)
        return pd.Series(found, dtype=float).dropna()


AnyClaim = Claim | RankClaim


@dataclass(frozen=True)
class Verdict:
    """The mean effect over calibration sets, its 95 % interval (None for fewer than two sets), and what follows."""

    effect: float | None
    low: float | None
    high: float | None
    num_sets: int
    word: Word


def judge(effects: Sequence[float], side: Side, threshold: float) -> Verdict:
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


def unmatched(frame: pd.DataFrame, claims: Sequence[AnyClaim]) -> list[str]:
    """Claims that speak of runs that are not there, in words: not yet done, or a slip in a value."""
    finished = frame[frame["state"] == "finished"]
    told = []
    for claim in claims:
        told += [
            f"{claim.name}: no finished run has {', '.join(f'{key}={value}' for key, value in arm.items())}"
            for arm in claim.arms
            if chosen(finished, arm).empty
        ]
    return told


def experiments_of(frame: pd.DataFrame, claim: AnyClaim) -> str:
    """The experiment files whose runs a claim speaks of: `reprune experiments=NAME` makes them again."""
    if EXPERIMENTS not in frame:
        return ""
    named = [chosen(frame, arm)[EXPERIMENTS].dropna().astype(str) for arm in claim.arms]
    return ", ".join(sorted(set(pd.concat(named))))


def verdict_table(frame: pd.DataFrame, claims: Sequence[AnyClaim]) -> pd.DataFrame:
    """A row a claim: claim, metric, measure, effect, low, high, sets, threshold, verdict, experiments; of finished runs."""
    finished = frame[frame["state"] == "finished"]
    rows = []
    for claim in claims:
        found = judge(list(claim.effects(finished)), claim.side, claim.threshold)
        rows.append(
            {
                "claim": claim.name,
                "metric": " ~ ".join(filter(None, [claim.metric, getattr(claim, "ranks_as", None)])),
                "measure": claim.measure,
                "effect": found.effect,
                "low": found.low,
                "high": found.high,
                "sets": found.num_sets,
                "threshold": f"{'>' if claim.side == 'above' else '<'} {claim.threshold:g}",
                "verdict": found.word,
                "experiments": experiments_of(finished, claim),
            }
        )
    return pd.DataFrame(rows)
