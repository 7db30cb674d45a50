"""The last layer of a window, solved once the window is trained: what a few steps leave of its error.

With h_t what enters the layer, e_t what the window's output lacks of its target at token t and w_t the token's weight,
the window's loss as a function of a change Δ of the layer's weight within its mask is

    Σ_t w_t ‖e_t − Δ h_t‖²,   minimal where   Δ (Σ_t w_t h_t h_tᵀ) = Σ_t w_t e_t h_tᵀ   at the kept weights,

exactly, since nothing but an addition stands between the layer and the window's output. Conjugate gradients from Δ = 0
take first what weighs most, such as tokens with massive activations; a few iterations leave alone what would be fitted to
the calibration text's noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
"""What is added to the diagonal of the Gram, as a share of it: few tokens leave it singular."""


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
    """Change the weights of `view` that `keep` [d_out, d_in] keeps by `iterations` steps at most; what to record of it.

    `view` is the layer whose output the window's last block adds to its residual stream; the window is in float32. The
    loss is read `batch` sequences at a time, by each of `ranks` its share. RunError, naming `place`, for a solution that
    is not finite.
    """
    d_out, d_in = view.shape
    device = view.stored.device
    gram, cross = torch.zeros(d_in, d_in, device=device), torch.zeros(d_out, d_in, device=device)
    sums = torch.zeros(2, dtype=torch.float64)
    mine = ranks.share(len(objective))
    for start in range(mine.start, mine.stop, batch):
        samples = range(start, min(start + batch, mine.stop))
        with _given(view.module) as given:
            output, target = objective.outputs(samples, _own)
        weights_N = objective.token_weights(target).reshape(-1, 1)
        roots_N = weights_N.sqrt()
        inputs_ND = given[-1].reshape(-1, d_in).float() * roots_N
        lacking_ND = (target - output).reshape(-1, d_out) * roots_N
        add_products(gram, inputs_ND)
        cross.addmm_(lacking_ND.T, inputs_ND)
        sums += torch.tensor([float(lacking_ND.double().square().sum()), float(weights_N.double().sum())])
    ranks.sum_([gram, cross, sums])
    scale = gram.diagonal()
    # What was never other than zero has nothing to give, and nothing is asked of it.
    scale[scale == 0] = 1
    # Each feature by its own size: one massive activation is larger than all others together.
    scale.mul_(1 + DAMP)
    found = conjugate_gradients(gram, cross, keep, None, min_iterations=1, max_iterations=iterations)
    if not bool(torch.isfinite(found.weight).all()):
        raise RunError(f"{place}: the last layer's least squares have no finite solution; set reconstruction.last_layer_iterations=0")  # fmt: skip
    view.write(view.weight.float() + found.weight)
    before, mass = sums.tolist()
    losses = [before / (mass * d_out), (before - found.gained) / (mass * d_out)]
    return {"iterations": found.iterations, "losses": losses}


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
