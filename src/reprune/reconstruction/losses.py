"""Losses between a window's output and its target, both [batch, tokens, hidden]; each a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mse(student_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """‖student − target‖² / (B·T·H): the study's objective, and the error it reports."""
    return (student_BTH - target_BTH).square().mean()


def relative_mse(student_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Mean over tokens of ‖e_t‖²/‖h_t‖²."""
    errors_BT = (student_BTH - target_BTH).square().sum(dim=-1)
    return (errors_BT / target_BTH.square().sum(dim=-1)).mean()


def cosine(student_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Mean over tokens of 1 − cos(student, target)."""
    return (1 - torch.cosine_similarity(student_BTH, target_BTH, dim=-1)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    loss.__name__: loss for loss in (mse, relative_mse, cosine)
}
