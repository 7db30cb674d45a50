"""How far a block turns what goes through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reprune.errors import RunError
from reprune.sparsity.allocation import ModelView


def block_means(view: ModelView, of_cosine: Callable[[Tensor], Tensor]) -> dict[int, float]:
    """For each block with layers to prune, the mean over all tokens of a function of cos(x_in, x_out).

    The cosine is float64 [tokens], a sequence at a time, so that small angles survive; 0 for a token that is zero.
    """
    found = {}
    for block in view.visit():
        if not block.layers:
            continue
        total, tokens = 0.0, 0
        for entering, leaving in block.states():
            cosine = torch.nn.functional.cosine_similarity(entering.double(), leaving.double(), dim=-1)
            total += float(of_cosine(cosine).sum())
            tokens += len(entering)
        if not abs(total) < float("inf"):
            raise RunError(f"block {block.index}: what enters or leaves it is not finite; try dtype=float32")
        found[block.index] = total / tokens
    return found
