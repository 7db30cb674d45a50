"""Windows over blocks: which blocks are trained together, which are new in a window, which are frozen after it."""

from __future__ import annotations

from dataclasses import dataclass

from reprune.errors import ConfigError


@dataclass(frozen=True)
class BlockWindow:
    """Blocks [first, stop) are trained; [new, stop) are pruned first; [first, frozen) are frozen afterwards."""

    index: int
    first: int
    new: int
    frozen: int
    stop: int


def windows_over(num_blocks: int, window: int | None, stride: int | None) -> list[BlockWindow]:
    """Windows that start at −(window − stride) and are clipped to the model (arXiv 2406.15524, §3.3).

    None for both is one window over the whole model. For window 2, stride 1: {0}, {0,1}, … {L−2,L−1}, {L−1}. Raises ConfigError for a window larger than the model.
    """
    if window is None or stride is None:
        window = stride = num_blocks
    if window > num_blocks:
        raise ConfigError(
            "reconstruction.window", f"larger than the model, which has {num_blocks} blocks", value=window
        )
    starts = list(range(stride - window, num_blocks, stride))
    entered = 0
    found = []
    for index, start in enumerate(starts):
        first, stop = max(0, start), min(num_blocks, start + window)
        following = max(0, starts[index + 1]) if index + 1 < len(starts) else num_blocks
        found.append(BlockWindow(index, first, entered, min(following, stop), stop))
        entered = max(entered, stop)
    return found
