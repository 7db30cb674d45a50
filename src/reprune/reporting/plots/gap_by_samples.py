"""The gap, [held-out ÷ held-out of none] ÷ [calibration ÷ calibration of none] of errors of the last block, by technique and number of sequences reconstructed on; above 1 a technique fits the calibration text."""

from __future__ import annotations

from matplotlib.figure import Figure

from reprune.reporting.drawing import COLOURS, MARKERS, NothingToDrawError, Runs, grid_of
from reprune.reporting.gap import gaps


def draw(runs: Runs) -> Figure:
    """A panel a held-out text; a point a run and calibration text, a line the mean."""
    found = gaps(runs.frame).dropna(subset=["sequences"])
    if found.empty:
        raise NothingToDrawError(
            "no run has a partner with reconstruction=none on the same mask data and seeds"
        )
    texts = list(dict.fromkeys(found["held_out"]))
    techniques = list(dict.fromkeys(found["technique"]))
    sizes = sorted(set(found["sequences"]))
    figure, axes = grid_of(len(texts), share=True)
    for axis, text in zip(axes, texts, strict=True):
        for number, technique in enumerate(techniques):
            some = found[(found["held_out"] == text) & (found["technique"] == technique)]
            # Techniques stand side by side within a number of sequences.
            shift = 0.5 * ((number + 0.5) / len(techniques) - 0.5)
            place = some["sequences"].map(sizes.index) + shift
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number // len(COLOURS) % len(MARKERS)],
            }
            axis.scatter(place, some["gap"], s=22, alpha=0.6, lw=0, label=technique, **look)
            mean = some["gap"].groupby(place).mean()
            axis.plot(mean.index, mean, lw=1.2, color=look["color"], marker="_", ms=12)
        axis.axhline(1, color="#7f8790", lw=0.8, ls=":")
        axis.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes])
        axis.set_xlim(-0.6, len(sizes) - 0.4)
        axis.set_title(text)
        axis.set_xlabel("sequences reconstructed on")
    axes[0].set_ylabel("gap")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    return figure
