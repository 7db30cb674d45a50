"""What an arm can still do, a number a kind of evaluation, and how it goes with the reconstruction error."""

from __future__ import annotations

import warnings
from collections import defaultdict

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ConstantInputWarning, pearsonr, rankdata, spearmanr

from reprune.reporting.replicates import source_keys
from reprune.reporting.tables import EVALUATED
from reprune.seeding import seed_for

NUM_DRAWS = 1000
LEVEL = 0.95
POOLED = "pooled"
COLUMNS = ("error", "metric", "technique", "rho", "low", "high", "runs", "sets")


def downstream(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the pruned models, a column a kind of evaluation: perplexity (geometric mean over texts), KL and acc (means).

    Only texts and tasks that every run with that kind has count; a kind that no run has is no column.
    """
    found = {}
    for kind, begin, end in EVALUATED:
        prefix = f"eval/pruned/{begin}"
        columns = [c for c in frame if str(c).startswith(prefix) and str(c).endswith(end)]
        columns = [c for c in columns if "/" not in str(c)[len(prefix) : len(str(c)) - len(end)]]
        values = frame[columns].dropna(how="all").dropna(axis=1).astype(float)
        if values.shape[1]:
            mean = np.exp(np.log(values).mean(axis=1)) if kind == "perplexity" else values.mean(axis=1)
            found[kind] = mean.reindex(frame.index)
    return pd.DataFrame(found, index=frame.index)


def last_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """The last block's error per element, `calibration` and `held-out`: means over a run's texts in that role."""
    found = {}
    for role, name in (("calibration", "calibration"), ("probe", "held-out")):
        columns = [
            c for c in frame if str(c).startswith(f"reconstruction/{role}/") and str(c).endswith("/last")
        ]
        if columns:
            found[name] = frame[columns].astype(float).mean(axis=1)
    return pd.DataFrame(found, index=frame.index)


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ of error and downstream metric of finished runs: a row an error, a metric and a technique, or pooled.

    `low` and `high` hold 95 % of ρ over draws of calibration sets with replacement (1000, of a fixed seed), a set with
    all of its runs; missing for fewer than three sets. Draws without two different values have no ρ and do not count.
    Rows of fewer than three runs are left out.
    """
    finished = frame[frame["state"] == "finished"]
    metrics, errors = downstream(finished), last_errors(finished)
    keys = source_keys(finished)
    sets = finished.groupby(keys, dropna=False, sort=True).ngroup()
    techniques = {POOLED: finished.index} | {
        str(name): runs.index for name, runs in finished.groupby("choice/reconstruction", sort=False)
    }
    rows = []
    for error in errors:
        for metric in metrics:
            pairs = pd.DataFrame({"x": errors[error], "y": metrics[metric], "set": sets}).dropna()
            for technique, index in techniques.items():
                some = pairs.loc[pairs.index.intersection(index)]
                if len(some) < 3 or some["x"].nunique() < 2 or some["y"].nunique() < 2:
                    continue
                x, y, set_ = some["x"].to_numpy(float), some["y"].to_numpy(float), some["set"].to_numpy(int)
                low, high = resampled_interval(x, y, set_)
                numbers = (float(spearmanr(x, y).statistic), low, high, len(some), some["set"].nunique())
                rows.append((error, metric, technique, *numbers))
    # Without intervals the columns would hold None, not numbers that are missing.
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"low": float, "high": float})


def resampled_interval(
    x: NDArray[np.float64], y: NDArray[np.float64], sets: NDArray[np.int64]
) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of Spearman's ρ over draws of sets with replacement; x, y, sets are [runs].

    None for fewer than three sets.
    """
    members = [np.flatnonzero(sets == number) for number in np.unique(sets)]
    if len(members) < 3:
        return None, None
    stream = np.random.default_rng(seed_for(0, "report", "calibration sets"))
    draws = stream.integers(len(members), size=(NUM_DRAWS, len(members)))
    # Draws of one size are ranked together; where sets have as many runs each, that is all of them.
    by_size: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    for draw in draws:
        rows = np.concatenate([members[number] for number in draw])
        by_size[len(rows)].append(rows)
    found = np.concatenate(
        [rank_correlations(x[np.stack(some)], y[np.stack(some)]) for some in by_size.values()]
    )
    found = found[~np.isnan(found)]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def rank_correlations(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's ρ of each row of x and y, [rows, runs]: Pearson's of the ranks; NaN where a row is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        rho: NDArray[np.float64] = pearsonr(rankdata(x, axis=1), rankdata(y, axis=1), axis=1).statistic
    return rho
