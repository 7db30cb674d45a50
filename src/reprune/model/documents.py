"""Several documents in one row: a block's attention stays within each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

MASK = "attention_mask"


@contextmanager
def documents_apart(blocks: nn.ModuleList, positions_BT: Tensor | None) -> Iterator[None]:
    """While it lasts, no token of a row attends to a document before its own: positions begin anew at each.

    transformers does so itself for some models that are told positions; here every block's own mask, whatever it hides
    already, is narrowed. A block that carries a state from token to token is not helped by that.
    """
    if positions_BT is None:
        yield
        return
    document = (positions_BT == 0).cumsum(dim=1)
    same_B1TT = (document[:, :, None] == document[:, None, :]).unsqueeze(1)

    def narrow(
        block: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = list(signature(type(block).forward).parameters)[1:]
        place = names.index(MASK) if MASK in names else len(positional)
        if place < len(positional):
            narrowed = _narrowed(positional[place], same_B1TT)
            return (*positional[:place], narrowed, *positional[place + 1 :]), keywords
        if MASK in names or MASK in keywords:
            keywords = {**keywords, MASK: _narrowed(keywords.get(MASK), same_B1TT)}
        return positional, keywords

    handles = [block.register_forward_pre_hook(narrow, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _narrowed(mask: Any, same_B1TT: Tensor) -> Any:
    """What a mask of True and False, or of numbers to be added, lets through within documents; None: all before."""
    if mask is None:
        return same_B1TT.tril()
    same_B1TT = same_B1TT.to(mask.device)
    if mask.dtype == torch.bool:
        return mask & same_B1TT
    return mask.expand_as(same_B1TT.expand(-1, mask.shape[1], -1, -1)).masked_fill(
        ~same_B1TT, torch.finfo(mask.dtype).min
    )
