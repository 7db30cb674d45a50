"""Claims with their effects over calibration sets: the 95 % interval, the threshold (tick), and what follows."""

from __future__ import annotations

import textwrap

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.drawing import COLOURS, STYLE, Plot

LOOKS = {"holds": (COLOURS[2], "o"), "does not hold": (COLOURS[3], "X"), "cannot say": (COLOURS[8], "s")}
MEANING = {
    "reduction": "reduction, 1 − arm ÷ other",
    "difference": "difference, arm − other",
    "ratio": "arm ÷ other",
}
WIDTH = 62
"""Characters of a claim before its name is broken."""


def verdict_plot(verdicts: pd.DataFrame) -> Plot:
    """`verdict_table` as a figure: a panel a measure, a row a claim; claims without an effect are left out."""
    drawn = verdicts[verdicts["effect"].notna()]
    if drawn.empty:
        return Plot("verdicts", __doc__.strip(), None, "no claim has an effect")
    with mpl.rc_context(dict(STYLE)):
        return Plot("verdicts", __doc__.strip(), _draw(drawn))


def _draw(drawn: pd.DataFrame) -> Figure:
    panels = list(drawn.groupby("measure", sort=False))
    heights = [len(claims) + 1 for _, claims in panels]
    figure = Figure(figsize=(8.6, 0.34 * sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).ravel()
    for axis, (measure, claims) in zip(axes, panels, strict=True):
        for place, claim in enumerate(claims.to_dict("records")):
            colour, marker = LOOKS[claim["verdict"]]
            if pd.notna(claim["low"]):
                axis.plot([claim["low"], claim["high"]], [place, place], color=colour, lw=2)
            axis.plot(claim["effect"], place, marker=marker, color=colour, ls="", ms=6)
            side, _, threshold = claim["threshold"].partition(" ")
            axis.plot(float(threshold), place, marker="|", color="#7f8790", ms=14, mew=1.5, ls="")
            axis.annotate(
                "▸" if side == ">" else "◂", (float(threshold), place), xytext=(5 if side == ">" else -5, 0),
                textcoords="offset points", ha="center", va="center", fontsize=7, color="#7f8790",
            )  # fmt: skip
        names = [textwrap.fill(f"{name}", WIDTH) for name in claims["claim"]]
        axis.set_yticks(range(len(names)), names, fontsize=7.5)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel(MEANING.get(str(measure), str(measure)))
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, lw=2) for colour, marker in LOOKS.values()
    ]
    figure.legend(handles, list(LOOKS), loc="outside upper right", ncols=3)
    return figure
