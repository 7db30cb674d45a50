"""How long a run takes by its arithmetic: a guess before anything is loaded, for where no finished run tells better."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch

from reprune.calibration.gather import Request
from reprune.operations import (
    Visits,
    columns,
    distinct,
    factors,
    grams,
    last_layers,
    last_weights,
    products,
    solver_reads,
)
from reprune.run_plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast work goes: shares of the rate of a large matrix product, operations, seconds beside products.

    The defaults are rounded from one thread of a CPU: `benchmarks/bench_cost_growth.py`, the table of 23 November 2026 in
    `experiments/results`, and runs of SmolLM2-135M. A GPU has others: there the table is to be made anew.
    """

    forward: float = 0.75
    """Of the rate of a large matrix product, in forward passes."""
    training: float = 0.75
    """The same in training steps and gradients."""
    mixed: float = 0.5
    """The same, of bfloat16's rate, in training steps whose products are in bfloat16."""
    fitting: float = 0.9
    """The same in Grams, their factors, sweeps and solvers."""
    attention: float = 4.0
    """Operations of a forward pass for each pair of positions and hidden channel."""
    gram: float = 2.0
    """Operations of a Gram for each token and pair of inputs."""
    factor: float = 4 / 3
    """Operations of a Gram's factor, times the cube of its width."""
    last: float = 1.0
    """How much of a block's last layer a pass for statistics computes."""
    call: float = 1e-3
    """Seconds that a pass of a batch through a block takes beside its products."""
    step: float = 4e-3
    """Seconds that a training step of a block takes beside its products."""
    column: float = 5e-5
    """Seconds that a sweep's step over a column takes beside its products."""
    choosing: float = 2000.0
    """Operations in which a mask is chosen, a weight."""
    writing: float = 10.0
    """How many times the cost of reading a token is that of writing one."""


MEASURED = Pace()
FLOOR = Pace(
    forward=1, training=1, mixed=1, fitting=1, attention=2, gram=1, factor=1 / 3, last=0, call=0, step=0, column=0, choosing=0, writing=1
)  # fmt: skip
"""What passes, statistics, pruning and training cannot spare: products at the full rate, half of what is symmetric or causal."""

SIZE = 1024
REPEATS = 3


def guessed_seconds(plan: RunPlan) -> float:
    """Seconds of a run on this machine's device: the sum of `guessed_stages`."""
    return sum(guessed_stages(plan).values())


def guessed_stages(plan: RunPlan, pace: Pace = MEASURED) -> dict[str, float]:
    """Seconds by stage on this machine's device, of the stages of `StageMeter` in which something is computed.

    A forward pass takes 2 operations a parameter and token, and `pace.attention` · length a token and hidden channel; a
    training step or gradient takes thrice that. A method that reads Grams is taken for SparseGPT: a factor of each, a
    sweep over each layer. Masks chosen in another way count as one sorted list of scores; searches for masks, tasks
    and layers that are pruned one after the other within a block are left out. The device's rate is measured once, by
    a matrix product of the run's dtype and one of float32, which training, gradients and Grams are in. With `FLOOR` it
    is what the work on blocks cannot do without.
    """
    shapes, technique = plan.shapes, plan.technique
    visits, rounds = Visits.of(plan), len(plan.steps)
    # Reconstruction data that are the mask data are read once.
    every = _Reading.of(plan, pace, distinct(plan.requests))
    mask, own = (_Reading.of(plan, pace, plan.requests, use) for use in ("mask", "reconstruction"))
    float32 = product_rate(plan.device.device, torch.float32, plan.device.num_threads)
    training, fitting = pace.training * float32, pace.fitting * float32

    statistics = 0.0
    if plan.needs.any:
        spared = (1 - pace.last) * 2 * mask.tokens * last_weights(shapes) / (pace.forward * mask.rate)
        statistics = rounds * (mask.forward * shapes.num_blocks - spared)
    pruning = (
        sum(shapes.num_weights.values()) * pace.choosing * rounds / float32 if plan.needs.prunes else 0.0
    )
    if plan.needs.gram:
        statistics += rounds * pace.gram * grams(shapes, mask.tokens) / fitting
        swept = pace.factor * factors(shapes) + products(shapes) / 2
        pruning += rounds * (swept / fitting + columns(shapes) * pace.column)
    layerwise = technique.layerwise
    if layerwise is not None:
        again, added = solver_reads(plan)
        own_statistics = again * own.forward * shapes.num_blocks
        own_statistics += added * pace.gram * grams(shapes, own.tokens) / fitting
        statistics += visits.fitted * own_statistics
        pruning += visits.fitted * layerwise.products * products(shapes) / fitting

    reconstruction = 0.0
    if technique.trains:
        stop = _Reading.of(
            plan, pace, [it for it in plan.requests if it.name == technique.stop_on], "validation"
        )
        targets = own.forward + stop.forward if technique.target_chain == "sparse" else 0.0
        steps = ceil(own.sequences / technique.batch_size)
        stepping = training
        if technique.training_dtype == "bfloat16":
            bfloat16 = product_rate(plan.device.device, torch.bfloat16, plan.device.num_threads)
            stepping = pace.mixed * bfloat16
        epochs = technique.epochs * (3 * own.operations / stepping + steps * pace.step)
        checks = (technique.epochs + 1) * stop.forward
        reconstruction = visits.trained * (epochs + checks + targets)
        if technique.last_layer_iterations:
            reconstruction += visits.trained * own.operations / (pace.forward * float32)
            reconstruction += last_layers(plan, visits, own.tokens, pace.gram) / fitting

    read, written = mask.tokens, sum(map(_tokens, (it for it in plan.requests if it.source.needs_model)))
    evaluated = sum(text.tokens_NT.numel() for entry in plan.suite for text in entry.texts.values())
    whole = 2 * shapes.num_parameters / (pace.forward * mask.rate)
    return {
        "text": whole * pace.writing * written,
        "describing": whole * read,
        "gradients": _gradients(plan, pace, mask, training),
        "dense chain": every.forward * shapes.num_blocks,
        "pruned chain": every.forward * visits.earlier * rounds,
        "statistics": statistics,
        "pruning": pruning,
        "measuring": every.forward * (shapes.num_blocks * rounds + visits.frozen),
        "reconstruction": reconstruction,
        "dense evaluation": whole * evaluated,
        "evaluation": whole * evaluated,
    }


@dataclass(frozen=True)
class _Reading:
    """Texts that go through one block: their size, operations, and seconds of a forward pass."""

    sequences: int
    tokens: int
    operations: float
    rate: float
    forward: float

    @staticmethod
    def of(plan: RunPlan, pace: Pace, requests: Sequence[Request], use: str | None = None) -> _Reading:
        shapes, device = plan.shapes, plan.device
        rate = product_rate(device.device, device.dtype, device.num_threads)
        read = [request for request in requests if use in (None, request.use)]
        weights = 2 * shapes.num_block_parameters / shapes.num_blocks
        operations, calls = 0.0, 0
        for request in read:
            length = request.source.length or 0
            operations += _tokens(request) * (weights + pace.attention * length * shapes.hidden_size)
            calls += ceil((request.source.num_sequences or 0) / device.sequences_a_pass(max(1, length)))
        return _Reading(
            sequences=sum(request.source.num_sequences or 0 for request in read),
            tokens=sum(map(_tokens, read)),
            operations=operations,
            rate=rate,
            forward=operations / (pace.forward * rate) + calls * pace.call,
        )


def _gradients(plan: RunPlan, pace: Pace, mask: _Reading, training: float) -> float:
    """Seconds of the gradients that a method reads: of the whole model's loss once a run, of a block's output in every round.

    The former go forward to the end of the blocks, and each block once more on the way back.
    """
    shapes, needs, seconds = plan.shapes, plan.needs, 0.0
    if needs.gradients:
        named = [it for it in plan.requests if needs.gradient_text in (None, it.name)]
        read = _Reading.of(plan, pace, named, "mask")
        outside = 2 * (shapes.num_parameters - shapes.num_block_parameters) * read.tokens
        seconds += shapes.num_blocks * read.forward
        seconds += 3 * (shapes.num_blocks * read.operations + outside) / training
    if needs.block_gradients:
        seconds += 3 * shapes.num_blocks * mask.operations * len(plan.steps) / training
    return seconds


def _tokens(request: Request) -> int:
    return (request.source.num_sequences or 0) * (request.source.length or 0)


@lru_cache
def product_rate(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Operations a second of a square product, the best of a few."""
    before = torch.get_num_threads()
    # Only where it differs: setting threads again makes small operations crawl.
    if before != num_threads:
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
        if before != num_threads:
            torch.set_num_threads(before)
