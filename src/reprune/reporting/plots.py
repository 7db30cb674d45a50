"""Plots of errors by block."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")

from matplotlib import pyplot as plt


def error_by_block(blocks: pd.DataFrame, path: Path) -> None:
    """errᵢ per block when it is frozen: calibration on the left, each held-out text beside it, a line an arm."""
    after = blocks[blocks["moment"] == "after"]
    texts = list(dict.fromkeys(after["text"]))
    # The shared calibration text first, then the held-out ones in the order of the record.
    shared = [text for text in texts if (after[after["text"] == text]["role"] == "calibration").all()]
    order = shared + [text for text in texts if text not in shared]
    figure, axes = plt.subplots(
        1, len(order), figsize=(3.1 * len(order) + 0.6, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    arms = list(dict.fromkeys(after["label"]))
    colours = plt.get_cmap("viridis")([index / max(1, len(arms) - 1) * 0.9 for index in range(len(arms))])
    for axis, text in zip(axes[0], order, strict=True):
        for arm, colour in zip(arms, colours, strict=True):
            line = after[(after["text"] == text) & (after["label"] == arm)].sort_values("block")
            if not len(line):
                continue
            trained = (line["role"] == "calibration").all()
            axis.plot(
                line["block"], line["error"], color=colour, lw=1.6, ls="-" if trained else "--", label=arm
            )
        axis.set_yscale("log")
        axis.set_title(f"{text}\n{_role(after, text)}", fontsize=9)
        axis.set_xlabel("block")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("error per element (dense vs pruned chain)")
    # The legend shows arms; solid and dashed are explained in the titles.
    handles, labels = axes[0][0].get_legend_handles_labels()
    for handle in handles:
        handle.set_linestyle("-")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(arms), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _role(after: pd.DataFrame, text: str) -> str:
    roles = set(after[after["text"] == text]["role"])
    if roles == {"calibration"}:
        return "calibration (solid)"
    return "held out (dashed)" if "calibration" not in roles else "held out (dashed), solid where trained on"
