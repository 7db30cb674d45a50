"""Essential sparsity (arXiv 2306.03805): how much of an arm's weights may go before the model is worse than it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from reprune.reporting.replicates import arm_names, set_keys
from reprune.reporting.tables import EVALUATED, names_between

TOLERANCE = 0.01
"""What a sparsity may cost, as a share of what the dense model has."""

LEAST_SPARSITIES = 3
REQUESTED = "config/sparsity"
COSTLY = ("perplexity", "acc")
"""What the dense model has a number of, so that a share of it can be lost."""

CURVE = ("arm", "metric", "over", "requested", "set", "sparsity", "cost")
COLUMNS = (
    "arm",
    "metric",
    "over",
    "tolerance",
    "knee",
    "below",
    "above",
    "cost_below",
    "cost_above",
    "returns",
    "sparsities",
    "sets",
    "sets_agree",
)
BETWEEN, AT_FIRST, NOT_REACHED = "between below and above", "already at the first", "not reached"


def knees(found: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """A row an arm and metric of `curves`: where the mean cost over calibration sets first exceeds `tolerance`.

    `knee` says whether that is between two sparsities, already at the first, or not reached. `above` is the first sparsity
    that costs more and `below` the one before it, which is the last of all where none costs more: measured shares of
    the pruned layers' weights, with the costs beside them. Where there is none, it is missing; nothing is interpolated.
    `returns`: a sparsity beyond `above` costs no more than `tolerance` again. `over`: the texts or tasks. `sets_agree`:
    how many of the `sets` have their first sparsity that costs more at the same place, or none as the mean has none.

    In the paper a model is trained on its task after pruning, so that less is lost there than here, where it is not.
    """
    rows = []
    for (arm, metric), curve in found.groupby(["arm", "metric"], sort=False):
        mean = mean_curve(curve)
        place = _first_above(mean["cost"], tolerance)
        last = len(mean) - 1 if place is None else place - 1
        own = [_requested_at(mean_curve(some), tolerance) for _, some in curve.groupby("set")]
        rows.append(
            {
                "arm": arm,
                "metric": metric,
                "over": curve["over"].iloc[0],
                "tolerance": tolerance,
                "knee": NOT_REACHED if place is None else BETWEEN if place else AT_FIRST,
                "below": mean["sparsity"].iloc[last] if last >= 0 else None,
                "above": None if place is None else mean["sparsity"].iloc[place],
                "cost_below": mean["cost"].iloc[last] if last >= 0 else None,
                "cost_above": None if place is None else mean["cost"].iloc[place],
                "returns": place is not None and bool((mean["cost"].iloc[place:] <= tolerance).any()),
                "sparsities": len(mean),
                "sets": curve["set"].nunique(),
                "sets_agree": own.count(_requested_at(mean, tolerance)),
            }
        )
    # Without any the columns would hold None, not numbers that are missing.
    numbers = dict.fromkeys(("below", "above", "cost_below", "cost_above"), float)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(numbers)


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an arm, metric, requested sparsity and calibration set: the measured sparsity and the cost, means over seeds.

    An arm is all finished runs that agree in everything but sparsity, seeds, sets and what changes no number. The cost of
    perplexity (geometric mean over texts) is pruned ÷ dense − 1, that of acc (mean over tasks) 1 − pruned ÷ dense; over the texts or tasks that the arm's runs with that kind all have of both models. Dense numbers are the
    run's own. A run without them has no row, and neither has an arm of fewer than three different sparsities.
    """
    finished = frame[frame["state"] == "finished"]
    if finished.empty:
        return pd.DataFrame(columns=list(CURVE))
    arms = arm_names(finished.drop(columns=REQUESTED))
    about = pd.DataFrame(
        {
            # Null stands for the pattern's own; what is measured may differ between replicates by what is rounded.
            "requested": finished[REQUESTED].astype(float).fillna(finished["sparsity"].round(3)),
            "set": finished.groupby(set_keys(finished), dropna=False).ngroup(),
            "sparsity": finished["sparsity"].astype(float),
        }
    )
    found = []
    for arm, runs in finished.groupby(arms, sort=False):
        for metric, over, cost in _costs(runs):
            points = about.loc[cost.index].assign(cost=cost).groupby(["requested", "set"]).mean()
            curve = points.reset_index().assign(arm=arm, metric=metric, over=over)
            if mean_curve(curve)["sparsity"].nunique() >= LEAST_SPARSITIES:
                found.append(curve[list(CURVE)])
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=list(CURVE))


def mean_curve(curve: pd.DataFrame) -> pd.DataFrame:
    """Requested and measured sparsity and cost, means over calibration sets, by rising sparsity; `curve` is one arm's.

    Of the sets that have every sparsity, if there are any: another mix of sets at each point would be a curve of its own.
    """
    there = curve.groupby("set")["requested"].nunique()
    whole = there.index[there == curve["requested"].nunique()]
    if len(whole):
        curve = curve[curve["set"].isin(whole)]
    means = curve.groupby("requested", as_index=False)[["sparsity", "cost"]].mean()
    return means.sort_values("sparsity", ignore_index=True)


def _costs(runs: pd.DataFrame) -> Iterator[tuple[str, str, pd.Series]]:
    """Each metric that runs of one arm have of the dense and of the pruned model, over what, and its cost by run."""
    for metric, begin, end in EVALUATED:
        if metric not in COSTLY:
            continue
        names = names_between(map(str, runs), f"eval/pruned/{begin}", end)
        names = [name for name in names if "/" not in name]
        pruned, dense = (
            runs.reindex(columns=[f"eval/{which}/{begin}{name}{end}" for name in names])
            .astype(float)
            .set_axis(names, axis=1)
            for which in ("pruned", "dense")
        )
        # What the dense model cannot do at all cannot be lost.
        both = pruned.notna() & (dense > 0)
        both = both[both.any(axis=1)]
        shared = [name for name in names if both[name].all()]
        if both.empty or not shared:
            continue
        have, had = (_mean(metric, values.loc[both.index, shared]) for values in (pruned, dense))
        yield metric, ", ".join(shared), have / had - 1 if metric == "perplexity" else 1 - have / had


def _mean(metric: str, values: pd.DataFrame) -> pd.Series:
    return np.exp(np.log(values).mean(axis=1)) if metric == "perplexity" else values.mean(axis=1)


def _first_above(costs: Sequence[float] | pd.Series, tolerance: float) -> int | None:
    return next((place for place, cost in enumerate(costs) if cost > tolerance), None)


def _requested_at(curve: pd.DataFrame, tolerance: float) -> float | None:
    """The sparsity that was asked for where a curve first costs more than `tolerance`."""
    place = _first_above(curve["cost"], tolerance)
    return None if place is None else float(curve["requested"].iloc[place])
