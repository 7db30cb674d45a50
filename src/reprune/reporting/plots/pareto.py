"""Quality against what it costs, an arm a point (means over replicates); the line joins the arms that no other beats in both."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.downstream import downstream, last_errors
from reprune.reporting.drawing import NothingToDrawError, Runs, grid_of, legend, log_scale


def draw(runs: Runs) -> Figure:
    """Time on the left, memory on the right; quality is perplexity where it was measured, else held-out error."""
    if runs.arms.nunique() < 2:
        raise NothingToDrawError("needs two arms")
    name, quality = _quality(runs.frame)
    costs = {
        "minutes": runs.frame["seconds"] / 60,
        "peak memory, GiB": runs.frame["peak_memory_bytes"] / 2**30,
    }
    figure, axes = grid_of(2, 3.8, 3.2)
    for axis, (cost, values) in zip(axes, costs.items(), strict=True):
        points = (
            pd.DataFrame({"cost": values, "quality": quality}).groupby(runs.arms, sort=False).mean().dropna()
        )
        for arm, point in points.iterrows():
            colour, marker = runs.looks[str(arm)]
            axis.scatter(point["cost"], point["quality"], color=colour, marker=marker, s=36, lw=0, zorder=3)
        front = pareto_front(points)
        axis.plot(front["cost"], front["quality"], color="#7f8790", lw=1, drawstyle="steps-post")
        axis.set_xlabel(cost)
        axis.set_ylabel(name)
        log_scale(axis.yaxis)
    legend(figure, runs)
    return figure


def _quality(frame: pd.DataFrame) -> tuple[str, pd.Series]:
    metrics, errors = downstream(frame), last_errors(frame)
    if "perplexity" in metrics:
        return "mean perplexity", metrics["perplexity"]
    if "held-out" in errors:
        return "error on held-out text", errors["held-out"]
    raise NothingToDrawError("no run has a perplexity or an error on held-out text")


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """The rows of `points` (cost, quality; both better where lower) that no other row beats, by rising cost."""
    ordered = points.sort_values(["cost", "quality"])
    best_before = ordered["quality"].cummin().shift(fill_value=float("inf"))
    return ordered[ordered["quality"] < best_before]
