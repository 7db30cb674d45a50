"""Training loss per epoch over the loss of the first epoch, a panel an arm, a line a window of blocks, the mean over replicates."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.drawing import NothingToDrawError, Runs, grid_of

MOST_PANELS = 12


def draw(runs: Runs) -> Figure:
    """Each window's objective has a scale of its own, so that only its course can be compared."""
    losses = epoch_losses(runs)
    if losses.empty:
        raise NothingToDrawError("no run was trained for more than one epoch")
    arms = list(dict.fromkeys(losses["arm"]))
    shown = arms[:MOST_PANELS]
    figure, axes = grid_of(len(shown), 2.9, 2.6, share=True)
    # The map's ends vanish on a black or a white page.
    whole = mpl.colormaps["plasma"]
    colours = mpl.colors.ListedColormap(whole(np.linspace(0.15, 0.85, 64)))
    last = max(1, losses["window"].max())
    for axis, arm in zip(axes, shown, strict=True):
        for window, line in losses[losses["arm"] == arm].groupby("window"):
            mean = line.groupby("epoch")["relative"].mean()
            axis.plot(mean.index, mean, lw=1, color=colours(float(window) / last))
        axis.set_title(arm)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("loss ÷ loss of first epoch")
    figure.colorbar(
        mpl.cm.ScalarMappable(mpl.colors.Normalize(0, last), colours), ax=axes, label="window", shrink=0.8
    )
    if len(arms) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(arms)} arms", fontsize=9)
    return figure


def epoch_losses(runs: Runs) -> pd.DataFrame:
    """A row a run, window and epoch: arm, window, epoch (from 1), relative; trainings of one epoch make no curve."""
    rows = []
    for run, records in runs.records.items():
        # A window that freezes several blocks is recorded with each of them.
        windows = {
            training["window"]: training["epoch_losses"] for row in records for training in row["training"]
        }
        for window, losses in windows.items():
            if len(losses) > 1 and losses[0] > 0:
                rows += [
                    {"arm": runs.arm_of[run], "window": window, "epoch": epoch, "relative": loss / losses[0]}
                    for epoch, loss in enumerate(losses, 1)
                ]
    return pd.DataFrame(rows, columns=["arm", "window", "epoch", "relative"])
