"""Negative log-likelihoods of tokens under a model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reprune.model.blocks import passing_on
from reprune.model.head import (
    LOGITS_AT_ONCE,
    final_hidden,
    has_trunk,
    head_logits,
    in_chunks,
    vocabulary_size,
)
from reprune.model.loading import LoadedModel
from reprune.model.packing import check_texts_apart


@torch.no_grad()
def token_losses(model: LoadedModel, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Of every token but the first of each row, in nats: float32 [rows, tokens − 1], on the host.

    `positions_BT` begin anew at each text of a row, and the first token of each such text is predicted from nothing that
    belongs to it: its loss, which is there as well, means nothing. None where each row is one text. The caller holds the
    model on its device. All rows go through the blocks at once (see `rows_a_pass`), the head takes some positions at a
    time, so that the logits of all are never there.
    """
    hidden = final_hidden(model, tokens_BT, positions_BT)[:, :-1].flatten(0, 1)
    targets_BT = tokens_BT[:, 1:].to(hidden.device)
    targets = targets_BT.flatten()
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for where in in_chunks(model, len(targets)):
        logits = head_logits(model, hidden[where]).float()
        losses[where] = cross_entropy(logits, targets[where], reduction="none")
    return losses.view(targets_BT.shape).cpu()


def rows_a_pass(model: LoadedModel, length: int) -> int:
    """How many rows of `length` tokens go through at once; the caller holds the model on its device.

    What a block has room for; where the model has no trunk to go without logits, fewer.
    """
    fitting = model.plan.sequences_a_pass(length)
    if has_trunk(model):
        return fitting
    return max(1, min(LOGITS_AT_ONCE // (vocabulary_size(model) * length), fitting))


@torch.no_grad()
def row_losses(model: LoadedModel, tokens_NT: Tensor, positions_NT: Tensor | None = None) -> Tensor:
    """The mean of every row's token losses, float64 [rows]; without those of the first token of a text.

    `positions_NT` begin anew at each text of a row; None where each row is one text.
    """
    if positions_NT is not None:
        check_texts_apart(model)
    with model.holding(model.model):
        size = rows_a_pass(model, tokens_NT.shape[1])
    batches = [
        (rows, None if positions_NT is None else positions_NT[start : start + size])
        for start, rows in zip(range(0, len(tokens_NT), size), torch.split(tokens_NT, size), strict=True)
    ]
    if model.on_disk is None:
        with model.holding(model.model):
            return torch.cat([_means(model, *batch) for batch in batches])
    # Each block is read once for all batches.
    states = [model.embed(*batch) for batch in batches]
    for number, block in enumerate(model.blocks):
        with model.holding(block):
            for index, (rows, places) in enumerate(batches):
                call = model.call(number, rows.shape[0], rows.shape[1], places)
                states[index] = call.run(block, states[index].to(model.plan.device)).cpu()
    with model.holding(*model.outside_blocks):
        found = []
        for state, batch in zip(states, batches, strict=True):
            with passing_on(model.blocks, state.to(model.plan.device), model.wraps):
                found.append(_means(model, *batch))
        return torch.cat(found)


def _means(model: LoadedModel, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
    """The mean of every row's token losses, float64 [rows]."""
    losses = token_losses(model, tokens_BT, positions_BT).double()
    if positions_BT is None:
        return losses.mean(dim=1)
    within = positions_BT[:, 1:] != 0
    return losses.where(within, 0).sum(dim=1) / within.sum(dim=1)
