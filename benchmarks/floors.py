"""What cannot be spared: the products of a pass with a model's weights, bare, and a run's arithmetic at the rate of such."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor

from reprune.arithmetic import FLOOR, guessed_stages
from reprune.model.description import hidden_size_of
from reprune.model.head import LOGITS_AT_ONCE
from reprune.model.loading import LoadedModel
from reprune.run_plan import RunPlan

BARE = "bare products"
"""The arm that does them."""
IN_BLOCKS = ("dense chain", "pruned chain", "statistics", "pruning", "measuring", "reconstruction")
"""Stages that have a floor."""


def bare_pass(
    model: LoadedModel, tokens: int, length: int, *, blocks: int = 1, heads: int = 1
) -> Callable[[], None]:
    """The products of a forward pass of `tokens` tokens in windows of `length`, with the model's weights where they lie.

    Those of the blocks `blocks` times, of the head `heads` times. In attention a token sees (length + 1)/2 others in the
    mean, twice: as many operations as (length + 1)/hidden products of hidden × hidden in every block, of which whole ones
    are done. Activations are one matrix a width.
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
        for weight in weights * blocks:
            inputs[weight.shape[1]] @ weight.T
        for some in inputs[head.shape[1]].split(at_once) * heads:
            some @ head.T
        plan.synchronise()

    return work


def floors_of(plan: RunPlan) -> dict[str, float]:
    """Seconds by stage that the work on blocks cannot do without, at the rate that bare products have now."""
    with bare_rates(plan):
        stages = guessed_stages(plan, FLOOR)
    return {stage: stages[stage] for stage in IN_BLOCKS}


@contextmanager
def bare_rates(plan: RunPlan) -> Iterator[None]:
    """Arithmetic goes by the rate of bare products with the shapes of the first block's layers, measured now.

    They are of as many tokens as a training step or, without training, the calibration text has.
    """
    shapes = [shape for name, shape in plan.shapes.linears.items() if name.startswith("0.")]
    source = plan.requests[0].source
    rows = plan.technique.batch_size if plan.technique.trains else source.num_sequences or 1
    tokens = rows * (source.length or 1)

    @cache
    def rate(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
        pairs = [
            [torch.ones(size, dtype=dtype, device=device) for size in ((tokens, d_in), (d_out, d_in))]
            for d_out, d_in in shapes
        ]
        seconds = []
        # The first touches its memory.
        for _ in range(3):
            begun = time.perf_counter()
            for left, right in pairs:
                left @ right.T
            plan.device.synchronise()
            seconds.append(time.perf_counter() - begun)
        return 2.0 * tokens * sum(d_out * d_in for d_out, d_in in shapes) / min(seconds[1:])

    with patch("reprune.arithmetic.product_rate", rate):
        yield
