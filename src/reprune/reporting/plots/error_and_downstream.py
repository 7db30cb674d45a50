"""Reconstruction error of the last block against what the model can still do, a point a run; ρ is Spearman's with 95 % of it over draws of calibration sets, pooled and within technique."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.downstream import POOLED, correlations, downstream, last_errors
from reprune.reporting.drawing import NothingToDrawError, Runs, grid_of, legend, log_scale


def draw(runs: Runs) -> Figure:
    """A row an error (calibration, held-out), a column a kind of evaluation."""
    if len(runs.frame) < 2:
        raise NothingToDrawError("needs two finished runs")
    metrics, errors = downstream(runs.frame), last_errors(runs.frame)
    if metrics.empty or not len(metrics.columns):
        raise NothingToDrawError("no evaluation that all finished runs have (perplexity, KL or acc)")
    found = correlations(runs.frame)
    figure, axes = grid_of(
        len(errors.columns) * len(metrics.columns), 3.6, 3.4, most=max(2, len(metrics.columns))
    )
    panels = [(error, metric) for error in errors for metric in metrics]
    for axis, (error, metric) in zip(axes, panels, strict=True):
        pairs = pd.DataFrame({"x": errors[error], "y": metrics[metric]}).dropna()
        for arm, some in pairs.groupby(runs.arms, sort=False):
            colour, marker = runs.looks[str(arm)]
            axis.scatter(some["x"], some["y"], color=colour, marker=marker, s=28, alpha=0.85, lw=0)
        log_scale(axis.xaxis)
        axis.set_xlabel(f"error on {error} text")
        axis.set_ylabel(f"mean {metric}")
        axis.set_title(_told(found[(found["error"] == error) & (found["metric"] == metric)]), loc="left")
    legend(figure, runs)
    return figure


def _told(found: pd.DataFrame) -> str:
    """The pooled ρ, then those within techniques; the table has the rest."""
    lines = []
    for _, row in found.iterrows():
        interval = "" if pd.isna(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
        name = "ρ pooled" if row["technique"] == POOLED else f"ρ {row['technique']}"
        lines.append(f"{name} {row['rho']:.2f}{interval}")
    more = len(lines) - 5
    return (
        "\n".join([*lines[:5], *([f"and {more} more in the table"] if more > 0 else [])])
        or "too few runs for ρ"
    )
