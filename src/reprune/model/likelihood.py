"""Negative log-likelihoods of tokens under a model."""

from __future__ import annotations

import torch
from torch import Tensor

from reprune.model.loading import LoadedModel

LOGITS_A_PASS = 2**26


@torch.no_grad()
def token_losses(model: LoadedModel, tokens_BT: Tensor) -> Tensor:
    """Of every token but the first of each row, in nats: float32 [rows, tokens − 1], on the host.

    The caller holds the model on its device. All rows go through at once: see `rows_a_pass`.
    """
    logits = model.logits(tokens_BT)[:, :-1].float()
    targets = tokens_BT[:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).cpu()


def rows_a_pass(model: LoadedModel, length: int) -> int:
    """How many rows of `length` tokens go through at once, so that their logits fit."""
    vocabulary = int(model.model.get_output_embeddings().weight.shape[0])
    return max(1, min(LOGITS_A_PASS // (vocabulary * length), model.plan.sequences_a_pass(length)))


@torch.no_grad()
def row_losses(model: LoadedModel, tokens_NT: Tensor) -> Tensor:
    """The mean of every row's token losses, float64 [rows]."""
    size = rows_a_pass(model, tokens_NT.shape[1])
    with model.plan.holding(model.model):
        return torch.cat(
            [token_losses(model, rows).double().mean(dim=1) for rows in torch.split(tokens_NT, size)]
        )
