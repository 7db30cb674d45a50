"""Losses between a window's output and its target, [batch, tokens, hidden]: one number a token, then a weighted mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mse(student_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """‖e_t‖² / H: with uniform weights the study's objective, and the error it reports."""
    return (student_BTH - target_BTH).square().mean(dim=-1)


def relative_mse(student_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """‖e_t‖²/‖h_t‖²."""
    errors_BT = (student_BTH - target_BTH).square().sum(dim=-1)
    return errors_BT / target_BTH.square().sum(dim=-1)


def cosine(student_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """1 − cos(student, target)."""
    return 1 - torch.cosine_similarity(student_BTH, target_BTH, dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    loss.__name__: loss for loss in (mse, relative_mse, cosine)
}


def uniform(target_BTH: Tensor) -> Tensor:
    """w_t = 1."""
    return torch.ones_like(target_BTH[..., 0])


def inverse_energy(target_BTH: Tensor) -> Tensor:
    """w_t = 1/‖h_t‖²: with `mse` a weighted mean that no token with a massive activation dominates."""
    return 1 / target_BTH.square().sum(dim=-1)


def capped_energy(target_BTH: Tensor) -> Tensor:
    """w_t = min(1, median_t ‖h‖² / ‖h_t‖²), the median of the token's own sequence.

    Tokens above the median count as much as the median one, so that a massive activation cannot dominate.
    """
    energy_BT = target_BTH.square().sum(dim=-1)
    return (energy_BT.median(dim=-1, keepdim=True).values / energy_BT).clamp(max=1)


TOKEN_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    weight.__name__: weight for weight in (uniform, inverse_energy, capped_energy)
}


def weighted_loss(loss: str, token_weight: str, student_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Σ_t w_t l_t / Σ_t w_t over all tokens of the batch, a scalar."""
    per_token_BT = LOSSES[loss](student_BTH, target_BTH)
    if token_weight == uniform.__name__:
        return per_token_BT.mean()
    weights_BT = TOKEN_WEIGHTS[token_weight](target_BTH)
    return (weights_BT * per_token_BT).sum() / weights_BT.sum()
