"""What plots share: the runs they are drawn from, their style, the files they become."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from reprune.reporting.frame import block_records, blocks
from reprune.reporting.knee import TOLERANCE
from reprune.reporting.replicates import arm_names

INK = "#1a1b1e"
"""The colour of text and axes; an SVG takes its page's instead."""
STYLE: Mapping[str, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    "grid.alpha": 0.18,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "font.size": 9,
    # A run's label is no formula.
    "text.parse_math": False,
    "svg.fonttype": "path",
}
# Readable on white and on near-black alike.
COLOURS = (
    "#3b7dd8",
    "#e07b39",
    "#2f9e6e",
    "#c2483f",
    "#9a6dd7",
    "#a9822b",
    "#d65fa4",
    "#4aa3a8",
    "#7f8790",
    "#7fae2e",
)
MARKERS = "osD^vP"
MOST_ARMS = 20


class NothingToDrawError(Exception):
    """These runs do not make this plot; the message says why, in one line."""


@dataclass(frozen=True)
class Runs:
    """Finished runs: `frame`, a row a run as `reporting.frame.results` gives it; what else plots need is read once.

    `tolerance`: see `reporting.knee`.
    """

    frame: pd.DataFrame
    tolerance: float = TOLERANCE

    @staticmethod
    def of(frame: pd.DataFrame, tolerance: float = TOLERANCE) -> Runs:
        """The finished runs of `results`."""
        return Runs(frame[frame["state"] == "finished"].reset_index(drop=True), tolerance)

    @cached_property
    def records(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of blocks.jsonl by run id."""
        return block_records(self.frame)

    @cached_property
    def blocks(self) -> pd.DataFrame:
        """A row a block, text and moment: `reporting.frame.blocks`."""
        return blocks(self.frame, self.records)

    @cached_property
    def arms(self) -> pd.Series:
        """What a run is drawn as, by the frame's index: its arm, or its technique where there are too many arms."""
        names = arm_names(self.frame)
        return names if names.nunique() <= MOST_ARMS else self.frame["choice/reconstruction"].astype(str)

    @cached_property
    def arm_of(self) -> dict[str, str]:
        """The same by run id."""
        return dict(zip(self.frame["id"], self.arms, strict=True))

    @cached_property
    def looks(self) -> dict[str, tuple[str, str]]:
        """Colour and marker of every arm."""
        found = enumerate(dict.fromkeys(self.arms))
        return {
            arm: (COLOURS[n % len(COLOURS)], MARKERS[n // len(COLOURS) % len(MARKERS)]) for n, arm in found
        }


@dataclass(frozen=True)
class Plot:
    """A plot that was asked for: its name, what it shows, and the figure or the reason why there is none."""

    name: str
    caption: str
    figure: Figure | None
    reason: str = ""


def draw_all(runs: Runs) -> Iterator[Plot]:
    """Every module of `reporting.plots`: its `draw(runs)` makes the figure, its docstring is the caption."""
    package = importlib.import_module("reprune.reporting.plots")
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        caption = (module.__doc__ or "").strip()
        with mpl.rc_context(dict(STYLE)):
            try:
                figure: Figure = module.draw(runs)
                # Laid out once: each of the files would do it again.
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
                yield Plot(module_info.name, caption, figure)
            except NothingToDrawError as reason:
                yield Plot(module_info.name, caption, None, str(reason))


def save(figure: Figure, path: Path) -> None:
    """Write PATH.png and PATH.pdf."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(dict(STYLE)):
        figure.savefig(path.with_suffix(".png"), dpi=150)
        # Without the date of its making, so that equal runs give equal files.
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def svg_of(figure: Figure, name: str) -> str:
    """The figure as an <svg> element without ground, its text and axes in the page's colour."""
    picture = StringIO()
    # The salt makes the ids of one figure's parts differ from another's on the page.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
    whole = picture.getvalue()
    return whole[whole.index("<svg") :].replace(INK, "currentColor")


def legend(figure: Figure, runs: Runs, *, points: bool = True) -> None:
    """The arms below the figure."""
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker if points else "", ls="" if points else "-")
        for colour, marker in runs.looks.values()
    ]
    # Inches of a label of that many characters in small print, and of its handle.
    most = max(1, int(figure.get_figwidth() / (0.075 * max(map(len, runs.looks)) + 0.5)))
    rows = -(-len(handles) // most)
    columns = -(-len(handles) // rows)
    figure.legend(handles, list(runs.looks), loc="outside lower center", ncols=columns)


def grid_of(
    count: int, width: float = 3.2, height: float = 3.0, most: int = 4, *, share: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels, at most `most` in a row, and their axes; `share`: one vertical scale."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.6, width * columns + 0.5), height * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def log_scale(axis: Any) -> None:
    """Make an x or y axis, whose data is drawn already, logarithmic, with plain numbers at few ticks."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = sorted(axis.get_view_interval())
    # Within half a decade the powers of ten give no tick at all.
    narrow = low > 0 and high / low < 6
    axis.set_major_locator(
        MaxNLocator(4) if narrow else LogLocator(subs=(1.0,) if high > low * 200 else (1.0, 3.0))
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:.3g}")
