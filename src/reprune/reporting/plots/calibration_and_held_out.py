"""Error of the last block on calibration text against held-out text, a point a run; along a dotted line their ratio is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.downstream import last_errors
from reprune.reporting.drawing import NothingToDrawError, Runs, grid_of, legend, log_scale

PREFIX = "reconstruction/probe/"


def draw(runs: Runs) -> Figure:
    """A panel a held-out text."""
    if len(runs.frame) < 2:
        raise NothingToDrawError("needs two finished runs")
    errors = last_errors(runs.frame)
    probes = [str(c) for c in runs.frame if str(c).startswith(PREFIX) and str(c).endswith("/last")]
    if "calibration" not in errors or not probes:
        raise NothingToDrawError("no run has errors on both calibration and held-out text")
    figure, axes = grid_of(len(probes))
    for axis, column in zip(axes, probes, strict=True):
        pairs = pd.DataFrame({"x": errors["calibration"], "y": runs.frame[column].astype(float)})
        pairs = pairs[(pairs > 0).all(axis=1)]
        for arm, some in pairs.groupby(runs.arms, sort=False):
            colour, marker = runs.looks[str(arm)]
            axis.scatter(some["x"], some["y"], color=colour, marker=marker, s=28, alpha=0.85, lw=0)
        log_scale(axis.xaxis)
        log_scale(axis.yaxis)
        axis.set_title(column.split("/")[2])
        axis.set_xlabel("error on calibration text")
        if len(pairs):
            _ratios(axis, pairs)
    axes[0].set_ylabel("error on held-out text")
    legend(figure, runs)
    return figure


def _ratios(axis: Any, pairs: pd.DataFrame) -> None:
    """Lines of equal ratio, a power of two each, that pass through the points."""
    left, right = axis.get_xlim()
    low, high = axis.get_ylim()
    powers = np.log2(pairs["y"] / pairs["x"])
    first, last = int(np.floor(powers.min())), int(np.ceil(powers.max()))
    # A dozen lines at most: further ones say nothing more.
    for power in range(first, last + 1, max(1, (last - first) // 6)):
        ratio = 2.0**power
        axis.plot([left, right], [left * ratio, right * ratio], ls=":", lw=0.8, color="#7f8790", zorder=1)
        x = min(right, high / ratio)
        if left < x and low < x * ratio:
            axis.annotate(
                f"×{ratio:g}", (x, x * ratio), xytext=(-2, -2), textcoords="offset points",
                fontsize=7, color="#7f8790", ha="right", va="top",
            )  # fmt: skip
    axis.set_xlim(left, right)
    axis.set_ylim(low, high)
