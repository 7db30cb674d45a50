"""Losses of tokens from all logits at once against logits of some positions at a time: tokens a second, memory, values.

SmolLM2-135M on windows of random tokens, which cost what text costs. 'whole' makes the logits of as many rows as fit
2^26 of them and takes the cross-entropy of all; the others send those rows through the blocks and then some positions
through the head. They take turns within a round; shown are medians over rounds of what was measured in the same one, and
the largest difference of any loss from 'whole'. The floor is the products of the pass, of blocks and head. Memory is the high-water mark beyond what lies there before a round.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from floors import BARE, bare_pass
from timing import Measure, Rows, Seconds, against, with_peak
from torch import Tensor

from reprune.model import head
from reprune.model.likelihood import token_losses
from reprune.model.loading import LoadedModel
from reprune.seeding import generator

WHOLE = "whole"
WHOLE_LOGITS = 2**26
POWERS = (22, 24, 26)
Losses = Callable[[LoadedModel, Tensor], Tensor]

SETTINGS = ("model", "windows", "length")


def arms(config: pytest.Config) -> list[str]:
    """How many logits are there at once."""
    return [BARE, WHOLE, *(f"2^{power}" for power in POWERS)]


@pytest.fixture(scope="module")
def tokens(model: LoadedModel, request: pytest.FixtureRequest) -> Tensor:
    """Random ones [windows, length]."""
    size = (request.config.getoption("windows"), request.config.getoption("length"))
    return torch.randint(2, head.vocabulary_size(model), size, generator=generator(0, "benchmark"))


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Tensor, int]]:
    """Losses and bytes beyond rest, by arm."""
    return {}


def test_losses(
    number: int, arm: str, model: LoadedModel, tokens: Tensor, measure: Measure, found: dict[str, Any]
) -> None:
    """One arm in one round."""
    ways = {WHOLE: whole_losses, **{f"2^{power}": chunked(2**power) for power in POWERS}}
    with model.plan.holding(model.model):
        if arm == BARE:
            measure(bare_pass(model, tokens.numel(), tokens.shape[1]))
        elif number:
            measure(lambda: ways[arm](model, tokens))
        else:
            found[arm] = with_peak(model, lambda: measure(lambda: ways[arm](model, tokens)))


def test_table(tokens: Tensor, seconds: Seconds, found: dict[str, Any], told: Rows) -> None:
    """What the rounds come to."""
    whole = found[WHOLE][0]
    times, floors = against(seconds, WHOLE), against(seconds, BARE)
    for name in found:
        took = seconds[name]
        told.append(
            {
                "logits at once": name,
                "tokens_a_second": tokens.numel() / median(took),
                "share": 1 / floors[name],
                "times_as_fast_as_whole": 1 / times[name],
                "mib_beyond_rest": found[name][1] / 2**20,
                "largest_difference": float((found[name][0] - whole).abs().max()),
            }
        )


def whole_losses(model: LoadedModel, tokens_NT: Tensor) -> Tensor:
    """Cross-entropy of whole logits, as many rows at a time as WHOLE_LOGITS allow."""
    rows = max(1, WHOLE_LOGITS // (head.vocabulary_size(model) * tokens_NT.shape[1]))
    found = []
    for part in tokens_NT.split(rows):
        logits = model.logits(part)[:, :-1].float()
        targets = part[:, 1:].to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        found.append(losses.view(targets.shape).cpu())
    return torch.cat(found)


def chunked(at_once: int) -> Losses:
    """`token_losses` with that many logits at once, on the rows that 'whole' takes at a time."""

    def losses(model: LoadedModel, tokens_NT: Tensor) -> Tensor:
        rows = max(1, WHOLE_LOGITS // (head.vocabulary_size(model) * tokens_NT.shape[1]))
        usual = head.LOGITS_AT_ONCE
        head.LOGITS_AT_ONCE = at_once
        try:
            return torch.cat([token_losses(model, part) for part in tokens_NT.split(rows)])
        finally:
            head.LOGITS_AT_ONCE = usual

    return losses
