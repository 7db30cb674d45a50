"""Share of the weights that the mask removes, by block and layer; runs with the same sparsities share a panel."""

from __future__ import annotations

import re

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.drawing import NothingToDrawError, Runs, grid_of

MOST_PANELS = 12


def draw(runs: Runs) -> Figure:
    """Blocks from left to right, layers from top to bottom; experts of one layer are one row, their mean by weights."""
    panels: dict[str, tuple[pd.DataFrame, list[str]]] = {}
    for run, records in runs.records.items():
        # Rounded, since counts round differently in layers of different sizes.
        shares = [
            (row["block"], [(n, round(it["measured"], 3)) for n, it in row["layers"].items()])
            for row in records
        ]
        if any(layers for _, layers in shares):
            if str(shares) not in panels:
                panels[str(shares)] = (layer_sparsities(records), [])
            panels[str(shares)][1].append(runs.arm_of[run])
    if not panels:
        raise NothingToDrawError("no run pruned a layer")
    shown = list(panels.values())[:MOST_PANELS]
    tallest = max(len(table) for table, _ in shown)
    figure, axes = grid_of(len(shown), 4.2, max(1.9, 0.22 * tallest + 1.0), most=3)
    for axis, (table, arms) in zip(axes, shown, strict=True):
        mesh = axis.pcolormesh(
            table.columns, range(len(table)), table, vmin=0, vmax=1, cmap="viridis", rasterized=True
        )
        axis.set_yticks(range(len(table)), table.index)
        axis.invert_yaxis()
        axis.grid(visible=False)
        axis.set_xlabel("block")
        names = list(dict.fromkeys(arms))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        axis.set_title(", ".join(names[:3]) + more)
    figure.colorbar(mpl.cm.ScalarMappable(mesh.norm, mesh.cmap), ax=axes, label="sparsity", shrink=0.9)
    if len(panels) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(panels)} different ones", fontsize=9)
    return figure


def layer_sparsities(records: list[dict[str, object]]) -> pd.DataFrame:
    """[layer names, blocks]: removed over all weights; numbers within a name (experts) are one '*'; missing where not pruned."""
    rows = [
        {
            "block": row["block"],
            "layer": re.sub(r"\d+", "*", name),
            "weights": layer["weights"],
            "removed": layer["removed"],
        }
        for row in records
        for name, layer in row["layers"].items()  # type: ignore[attr-defined]
    ]
    if not rows:
        return pd.DataFrame()
    sums = pd.DataFrame(rows).groupby(["layer", "block"], sort=False)[["removed", "weights"]].sum()
    return (sums["removed"] / sums["weights"]).unstack("block").sort_index(axis=1)
