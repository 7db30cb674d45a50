"""The last layer of a window, solved once the window is trained: what a few steps leave of its error.

With h_t what enters the layer, e_t what the window's output lacks of its target at token t and w_t the token's weight,
the window's loss as a function of a change Δ of the layer's weight within its mask is

    Σ_t w_t ‖e_t − Δ h_t‖²,   minimal where   Δ G = C at the kept weights,   G = Σ_t w_t h_t h_tᵀ,   C = Σ_t w_t e_t h_tᵀ,

exactly, since nothing but an addition stands between the layer and the window's output. A few steps of conjugate
gradients from Δ = 0 take first what weighs most, such as tokens with massive activations.

How far to go along Δ is for other text to say. The sequences are dealt to two halves, a and b, and each is solved by
itself; along the change Δ_a of an output row the loss of the other half is lowest after the part η of the way, so that

    η = (C_b·Δ_a + C_a·Δ_b) / (Δ_a G_b·Δ_a + Δ_b G_a·Δ_b),   held to [0, 1],

and the row goes η of the way that all sequences together give it: rather too little of it, since half of the text
shows less than all. What half of the text fits for itself alone is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reprune.engine.statistics import add_products
from reprune.errors import RunError
from reprune.model.linears import LinearView
from reprune.ranks import Ranks
from reprune.reconstruction.objective import WindowObjective
from reprune.reconstruction.solvers import conjugate_gradients

DAMP = 1e-4
"""What is added to the diagonal of a Gram, as a share of it: few tokens leave it singular."""


@torch.no_grad()
def solve_last_layer(
    objective: WindowObjective,
    view: LinearView,
    keep: Tensor,
    iterations: int,
    batch: int,
    ranks: Ranks,
    place: str,
) -> dict[str, Any]:
    """Change the weights of `view` that `keep`, bool [d_out, d_in], keeps by `iterations` steps at most; what to record of it.

    `view` is the layer whose output the window's last block adds to its residual stream; the window is in float32 and
    there are two sequences at least, `batch` of which are read at a time, by each of `ranks` its share. `confirmed` of
    the record is the mean of η over rows. RunError, naming `place`, for a solution that is not finite.
    """
    assert len(objective) > 1
    halves = [_Half.of(objective, view, range(first, len(objective), 2), batch, ranks) for first in (0, 1)]
    promised, spent = torch.zeros(2, len(keep), device=keep.device)
    for half, other in (halves, reversed(halves)):
        change, _ = half.solved(keep, iterations)
        promised += (other.cross * change).sum(dim=1)
        spent += ((change @ other.gram) * change).sum(dim=1)
    # A row that nothing changes has 0 of both.
    share = torch.where(spent > 0, promised / spent, 0).clamp(0, 1)
    halves[0].add_(halves.pop())
    change, taken = halves[0].solved(keep, iterations)
    weight = view.weight.float() + share[:, None] * change
    if not bool(torch.isfinite(weight).all()):
        raise RunError(f"{place}: the last layer's least squares have no finite solution; set reconstruction.last_layer_iterations=0")  # fmt: skip
    view.write(weight)
    return {"iterations": taken, "confirmed": float(share.mean())}


@dataclass
class _Half:
    """G [d_in, d_in] and C [d_out, d_in] of some sequences, float32."""

    gram: Tensor
    cross: Tensor

    @staticmethod
    def of(objective: WindowObjective, view: LinearView, samples: range, batch: int, ranks: Ranks) -> _Half:
        """Those of `samples`, by all of `ranks` together."""
        d_out, d_in = view.shape
        device = view.stored.device
        gram, cross = torch.zeros(d_in, d_in, device=device), torch.zeros(d_out, d_in, device=device)
        mine = ranks.share(len(samples))
        for start in range(mine.start, mine.stop, batch):
            with _given(view.module) as given:
                output, target = objective.outputs(samples[start : min(start + batch, mine.stop)], _own)
            weights_N = objective.token_weights(target).reshape(-1, 1)
            roots_N = weights_N.sqrt()
            inputs_ND = given[-1].reshape(-1, d_in).float() * roots_N
            lacking_ND = (target - output).reshape(-1, d_out) * roots_N
            add_products(gram, inputs_ND)
            cross.addmm_(lacking_ND.T, inputs_ND)
        ranks.sum_([gram, cross])
        return _Half(gram, cross)

    def solved(self, keep: Tensor, iterations: int) -> tuple[Tensor, int]:
        """Δ [d_out, d_in] for these sequences, and how many steps it took."""
        hessian = self.gram.clone()
        scale = hessian.diagonal()
        # What was never other than zero has nothing to give, and nothing is asked of it.
        scale[scale == 0] = 1
        # Each feature by its own size: one massive activation is larger than all others together.
        scale.mul_(1 + DAMP)
        found = conjugate_gradients(
            hessian, self.cross, keep, None, min_iterations=1, max_iterations=iterations
        )
        return found.weight, found.iterations

    def add_(self, other: _Half) -> None:
        """Both together, in the place of this one."""
        self.gram += other.gram
        self.cross += other.cross


def _own(block: int) -> dict[str, Tensor]:
    """Nothing stands in for a block's own weights."""
    return {}


@contextmanager
def _given(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given first in each call of the context."""
    found: list[Tensor] = []

    def keep(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(positional[0] if positional else next(iter(keywords.values())))

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
