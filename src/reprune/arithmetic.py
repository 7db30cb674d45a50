"""How long a run takes by its arithmetic alone: an order of magnitude, for where no finished run tells better."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from reprune.calibration.gather import Request
from reprune.run_plan import RunPlan

PASSES = 5
"""Forward passes over every text: the dense chain, the pruned one for statistics, before, after and onwards."""

SHARE = 0.5
"""Of the rate of a large matrix product."""

WRITING = 10
"""How many times the cost of reading a token is that of writing one."""

SIZE = 1024
REPEATS = 3


def guessed_seconds(plan: RunPlan) -> float:
    """Seconds on this machine's device: forward passes, training steps, gradients that a method reads, perplexities; no
    tasks, no pruner's own work.

    A forward pass takes 2 operations a parameter and token, a training step or gradient 6. The device's rate is measured once, by a
    matrix product of the run's dtype and one of float32, which training and gradients are in.
    """
    shapes, technique, device = plan.shapes, plan.technique, plan.device
    read, written = 0, 0
    for place, request in enumerate(plan.requests):
        # Reconstruction data that are the mask data are read once.
        if not any((it.role, it.source) == (request.role, request.source) for it in plan.requests[:place]):
            read += _tokens(request)
            written += _tokens(request) if request.source.needs_model else 0
    evaluated = sum(text.tokens_NT.numel() for entry in plan.suite for text in entry.texts.values())
    rounds = len(plan.steps)
    forward = 2 * shapes.num_block_parameters * PASSES * rounds * read
    forward += 2 * shapes.num_parameters * (2 * evaluated + WRITING * written)
    training = 0
    if technique.trains:
        own = [request for request in plan.requests if request.use == "reconstruction"]
        steps = sum(map(_tokens, own)) * technique.epochs * rounds
        window = technique.window or shapes.num_blocks
        training = 6 * shapes.num_block_parameters * steps * window // (technique.stride or window)
    own_forward, gradients = _gradients(plan)
    forward, training = forward + own_forward, training + gradients
    rate = _rate(device.device, device.dtype, device.num_threads)
    float32 = _rate(device.device, torch.float32, device.num_threads)
    return (forward / rate + training / float32) / SHARE


def _gradients(plan: RunPlan) -> tuple[int, int]:
    """Operations of the forward passes that only gradients take, and of the gradients.

    Of the whole model's loss once a run: to the end of the blocks, and each block once more on the way back. Of a
    block's output in every round.
    """
    shapes, needs, forward, gradients = plan.shapes, plan.needs, 0, 0
    mask = [request for request in plan.requests if request.use == "mask"]
    if needs.gradients:
        read = sum(_tokens(request) for request in mask if needs.gradient_text in (None, request.name))
        forward += 2 * shapes.num_block_parameters * read
        gradients += 6 * shapes.num_parameters * read
    if needs.block_gradients:
        gradients += 6 * shapes.num_block_parameters * sum(map(_tokens, mask)) * len(plan.steps)
    return forward, gradients


def _tokens(request: Request) -> int:
    return (request.source.num_sequences or 0) * (request.source.length or 0)


@lru_cache
def _rate(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Operations a second of a square product, the best of a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        matrix = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
        seconds = []
        for _ in range(1 + REPEATS):
            begun = time.perf_counter()
            # Read back, so that a device that works on its own is waited for.
            (matrix @ matrix).sum().item()
            seconds.append(time.perf_counter() - begun)
        return 2 * SIZE**3 / min(seconds[1:])
    finally:
        torch.set_num_threads(before)
