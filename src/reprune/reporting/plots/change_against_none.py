"""What each technique changes against `none`: error on calibration text, on held-out text, perplexity; a small point a calibration set, their mean with its 95 % interval (Student's t)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.downstream import downstream, last_errors
from reprune.reporting.drawing import NothingToDrawError, Runs, grid_of
from reprune.reporting.replicates import like_runs, source_keys
from reprune.reporting.verdicts import judge

TITLES = {
    "calibration": "error, calibration text",
    "held-out": "error, held-out texts",
    "perplexity": "perplexity",
}


def draw(runs: Runs) -> Figure:
    """A panel a metric, a row an arm; the last block's errors, perplexity as the geometric mean over texts."""
    metrics = pd.concat([last_errors(runs.frame), downstream(runs.frame)], axis=1)
    changes = {
        name: found for name in TITLES if name in metrics and len(found := _changes(runs, metrics[name]))
    }
    if not changes:
        raise NothingToDrawError("no technique has a run of `none` beside it, all else equal")
    # From the technique that changes the first metric least to the one that changes it most.
    means = pd.concat([found.groupby("arm")["change"].mean() for found in changes.values()], axis=1)
    arms = list(means.set_axis(list(changes), axis=1).sort_values(next(iter(changes)), ascending=False).index)
    figure, axes = grid_of(len(changes), 2.9, 0.34 * len(arms) + 0.5, share=True)
    for axis, (name, found) in zip(axes, changes.items(), strict=True):
        for place, arm in enumerate(arms):
            of_arm = 100 * found.loc[found["arm"] == arm, "change"]
            colour, marker = runs.looks[arm]
            axis.scatter(of_arm, [place] * len(of_arm), color=colour, s=9, alpha=0.55, lw=0)
            met = judge(list(of_arm), "below", 0.0)
            if met.low is not None and met.high is not None:
                axis.plot([met.low, met.high], [place, place], color=colour, lw=2.5, alpha=0.8)
            if met.effect is not None:
                axis.plot(met.effect, place, marker=marker, color=colour, ls="", ms=6)
        axis.axvline(0, color="#7f8790", lw=1)
        axis.set_title(TITLES[name])
        axis.set_xlabel("change against none, %")
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.5, -0.5)
    return figure


def _changes(runs: Runs, metric: pd.Series) -> pd.DataFrame:
    """A row a calibration set and an arm: `arm` and `change`, metric ÷ that of `none` − 1, where all else is equal."""
    rows: list[Mapping[str, object]] = []
    frame = runs.frame
    for index in like_runs(frame):
        group = frame.loc[index]
        untouched = index[group["choice/reconstruction"] == "none"]
        keys = [group[key] for key in source_keys(frame)]
        if not keys or untouched.empty:
            continue
        base = metric[untouched].groupby([key[untouched] for key in keys], dropna=False).mean()
        for arm, some in runs.arms[index.difference(untouched)].groupby(runs.arms, sort=False):
            of_arm = metric[some.index].groupby([key[some.index] for key in keys], dropna=False).mean()
            pairs = pd.concat([of_arm.rename("a"), base.rename("b")], axis=1, join="inner").dropna()
            rows += [{"arm": arm, "change": change} for change in pairs["a"] / pairs["b"] - 1]
    return pd.DataFrame(rows, columns=["arm", "change"])
