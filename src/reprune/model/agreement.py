"""Whether two models put out the same, up to rounding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from reprune.model.loading import LoadedModel

_STATES = 1e-3
_LOGITS = 8
"""Times the dtype's own rounding, on top of what the states may differ."""


def disagreement(model: LoadedModel, other: LoadedModel, tokens_BT: Tensor) -> str | None:
    """Where the other model's output for these tokens differs from the model's, in words; None where it does not.

    Blocks are computed in float32, one at a time on the device, so that also a half-precision model is held to what
    rounding in float32 explains: what leaves the last block must agree within 1e-3 of its norm at each token, and the
    logits, computed in the model's dtype, within eight roundings more.
    """
    states, logits = _outputs(model, tokens_BT)
    others = _outputs(other, tokens_BT)
    apart = _apart(states, others[0])
    # NaN is no agreement either.
    if not apart <= _STATES:
        return f"what leaves its last block differs by {apart:.1e} of the norm at a token"
    apart = _apart(logits, others[1])
    if not apart <= _STATES + _LOGITS * torch.finfo(logits.dtype).eps:
        return f"its logits differ by {apart:.1e} of their norm at a token"
    return None


@torch.no_grad()
def _outputs(model: LoadedModel, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What leaves the last block, float32 [batch, tokens, hidden], and logits [batch, tokens, vocabulary]."""
    entering = model.embed(tokens_BT)
    states = entering.to(model.plan.device).float()
    for index, block in enumerate(model.blocks):
        call = model.call(index, *tokens_BT.shape).in_float32()
        states = call.run(copy.deepcopy(block).to(model.plan.device).float(), states)
    with model.holding(*model.outside_blocks):
        return states, model.logits_behind_blocks(tokens_BT, states.to(entering.dtype))


def _apart(wanted: Tensor, found: Tensor) -> float:
    """The largest relative difference of the vectors along the last dimension."""
    wanted, found = wanted.float(), found.float()
    tiny = torch.finfo(torch.float32).tiny
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=tiny)).max())
