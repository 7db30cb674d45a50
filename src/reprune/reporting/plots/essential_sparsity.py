"""What each sparsity costs against the dense model, a line an arm (means over calibration sets, a small point a set); dotted: what it may cost; bars at the foot: from the last sparsity that costs no more to the first that does."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from reprune.reporting.drawing import COLOURS, MARKERS, MOST_ARMS, NothingToDrawError, Runs, grid_of
from reprune.reporting.knee import LEAST_SPARSITIES, curves, knees, mean_curve


def draw(runs: Runs) -> Figure:
    """A panel a metric; the vertical scale is linear up to the tolerance and logarithmic beyond."""
    found, tolerance = curves(runs.frame), runs.tolerance
    if found.empty:
        raise NothingToDrawError(
            f"no arm has {LEAST_SPARSITIES} sparsities, and a perplexity or acc of the dense and the pruned model"
        )
    table = knees(found, tolerance).set_index(["arm", "metric"])
    metrics, arms = list(dict.fromkeys(found["metric"])), list(dict.fromkeys(found["arm"]))
    shown = arms[:MOST_ARMS]
    figure, axes = grid_of(len(metrics), 4.2, 3.2)
    # Bars of several arms lie on each other, not over each other.
    step = min(0.035, 0.4 / len(shown))
    for axis, metric in zip(axes, metrics, strict=True):
        # Before anything is drawn, so that the margins are those of this scale.
        axis.set_yscale("symlog", linthresh=100 * tolerance)
        for number, arm in enumerate(shown):
            curve = found[(found["arm"] == arm) & (found["metric"] == metric)]
            if curve.empty:
                continue
            colour = COLOURS[number % len(COLOURS)]
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
            axis.scatter(100 * curve["sparsity"], 100 * curve["cost"], color=colour, s=9, alpha=0.55, lw=0)
            mean = 100 * mean_curve(curve)
            axis.plot(mean["sparsity"], mean["cost"], color=colour, marker=marker, ms=4.5, lw=1.2, label=arm)
            knee = table.loc[(arm, metric)]
            if knee[["below", "above"]].notna().all():
                foot = step * (number + 0.2)
                ends = (100 * knee["below"], 100 * knee["above"])
                axis.axvspan(*ends, foot, foot + 0.8 * step, color=colour, alpha=0.6, lw=0)
        axis.axhline(100 * tolerance, color="#7f8790", lw=1, ls=":")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("measured sparsity, %")
        axis.set_ylabel(f"cost in {metric}, %")
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    if len(arms) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(arms)} arms", fontsize=9)
    return figure
