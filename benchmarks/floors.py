"""What a pass of tokens through a model cannot do without: the products with its weights, bare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reprune.model.description import hidden_size_of
from reprune.model.head import LOGITS_AT_ONCE
from reprune.model.loading import LoadedModel

BARE = "bare products"
"""The arm that does them."""


def bare_pass(model: LoadedModel, tokens: int, length: int) -> Callable[[], None]:
    """The products of a forward pass of `tokens` tokens in windows of `length`, with the model's weights where they lie.

    In attention a token sees (length + 1)/2 others in the mean, twice: as many operations as (length + 1)/hidden
    products of hidden × hidden in every block, of which whole ones are done. Activations are one matrix a width.
    """
    plan, hidden = model.plan, hidden_size_of(model.model)
    weights = [view.weight for views in model.linears for view in views.values()]
    square = torch.ones(hidden, hidden, device=plan.device, dtype=plan.dtype)
    weights += [square] * int(len(model.blocks) * (length + 1) / hidden)
    head: Tensor = model.model.get_output_embeddings().weight
    inputs = {
        width: torch.ones(tokens, width, device=plan.device, dtype=plan.dtype)
        for width in {weight.shape[1] for weight in [*weights, head]}
    }
    at_once = max(1, LOGITS_AT_ONCE // len(head))

    @torch.no_grad()
    def work() -> None:
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
        for some in inputs[head.shape[1]].split(at_once):
            some @ head.T

    return work
