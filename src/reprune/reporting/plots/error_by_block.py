"""Error per element of each block's output when it is frozen, pruned chain against dense chain; bands hold the replicates of an arm."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from reprune.reporting.drawing import NothingToDrawError, Runs, grid_of, legend, log_scale


def draw(runs: Runs) -> Figure:
    """errᵢ per block: calibration on the left, each held-out text beside it, a line an arm."""
    if runs.blocks.empty:
        raise NothingToDrawError("no finished run has a block")
    after = runs.blocks[runs.blocks["moment"] == "after"]
    after = after.assign(arm=after["id"].map(runs.arm_of))
    texts = list(dict.fromkeys(after["text"]))
    # The shared calibration text first, then the held-out ones in the order of the record.
    shared = [text for text in texts if (after[after["text"] == text]["role"] == "calibration").all()]
    order = shared + [text for text in texts if text not in shared]
    figure, axes = grid_of(len(order), share=True)
    for axis, text in zip(axes, order, strict=True):
        of_text = after[after["text"] == text]
        for (arm, role), lines in of_text.groupby(["arm", "role"], sort=False):
            colour, _ = runs.looks[str(arm)]
            by_block = lines.groupby("block")["error"]
            mean = by_block.mean()
            style = "-" if role == "calibration" else "--"
            marker = "o" if len(mean) == 1 else ""
            axis.plot(mean.index, mean, color=colour, lw=1.6, ls=style, marker=marker)
            axis.fill_between(mean.index, by_block.min(), by_block.max(), color=colour, alpha=0.15, lw=0)
        axis.set_title(f"{text}\n{_role(of_text)}")
        axis.set_xlabel("block")
        axis.xaxis.get_major_locator().set_params(integer=True)
    log_scale(axes[0].yaxis)
    axes[0].set_ylabel("error per element")
    legend(figure, runs, points=False)
    return figure


def _role(of_text: pd.DataFrame) -> str:
    roles = set(of_text["role"])
    if roles == {"calibration"}:
        return "calibration (solid)"
    return "held out (dashed)" if "calibration" not in roles else "held out (dashed), solid where trained on"
