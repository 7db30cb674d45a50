"""Gradients of a model's loss for every block weight: block by block against the whole model at once; seconds, memory, values.

SmolLM2-135M on windows of random tokens. Both give the mean and the mean square over windows of each weight's gradient.
'whole' goes back through the whole model a window at a time and adds up the gradients of all weights; 'by block' keeps
the boundaries between blocks and goes back a block at a time (`engine.gradients`), its results in files. They take turns
within a round; shown are medians over rounds and the largest difference of a mean, as a share of the largest mean.
The floor is the products of a forward pass, of those back for inputs, and in blocks of those for weights.
Memory is the high-water mark beyond what lies there before a round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from floors import BARE, bare_pass
from timing import Measure, Rows, Seconds, against, with_peak
from torch import Tensor

from reprune.calibration.source import TextSet
from reprune.engine.activations import Stores
from reprune.engine.gradients import ModelGradients
from reprune.model.description import hidden_size_of
from reprune.model.loading import LoadedModel
from reprune.reconstruction.objective import next_token_loss
from reprune.seeding import generator

Way = Callable[[LoadedModel, TextSet, Path], dict[str, Tensor]]
WHOLE, BY_BLOCK, IN_FILES = "whole", "by block", "by block, boundaries in files"

SETTINGS = ("model", "windows", "length")


def arms(config: pytest.Config) -> list[str]:
    """Ways to the same gradients."""
    return [BARE, WHOLE, BY_BLOCK, IN_FILES]


@pytest.fixture(scope="module")
def text(model: LoadedModel, request: pytest.FixtureRequest) -> TextSet:
    """Windows of random tokens."""
    size = (request.config.getoption("windows"), request.config.getoption("length"))
    vocabulary = int(model.model.config.get_text_config().vocab_size)
    tokens = torch.randint(2, vocabulary, size, generator=generator(0, "benchmark"))
    return TextSet("random", "calibration", tokens, ("random",), {"name": "random"}, "as_tokenised")


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[dict[str, Tensor], int]]:
    """Mean gradients and bytes beyond rest, by arm."""
    return {}


def test_gradients(
    number: int,
    arm: str,
    model: LoadedModel,
    text: TextSet,
    measure: Measure,
    found: dict[str, Any],
) -> None:
    """One arm in one round."""
    ways: dict[str, Way] = {WHOLE: whole, BY_BLOCK: by_block, IN_FILES: in_files}

    def work() -> dict[str, Tensor]:
        with TemporaryDirectory() as folder:
            return ways[arm](model, text, Path(folder))

    if arm == BARE:
        with model.plan.holding(model.model):
            size = text.tokens_NT.numel(), text.tokens_NT.shape[1]
            measure(bare_pass(model, *size, blocks=3, heads=2))
    elif number:
        measure(work)
    else:
        found[arm] = with_peak(model, lambda: measure(work))


def test_table(seconds: Seconds, found: dict[str, Any], told: Rows) -> None:
    """What the rounds come to."""
    base, times, floors = found[WHOLE][0], against(seconds, WHOLE), against(seconds, BARE)
    for name in found:
        took, means = seconds[name], found[name][0]
        told.append(
            {
                "way": name,
                "seconds": median(took),
                "share": 1 / floors[name],
                "times_as_long_as_whole": times[name],
                "mib_beyond_rest": found[name][1] / 2**20,
                "largest_difference": max(
                    float((mean - base[layer]).abs().max() / base[layer].abs().max())
                    for layer, mean in means.items()
                ),
            }
        )


def whole(model: LoadedModel, text: TextSet, folder: Path) -> dict[str, Tensor]:
    """Mean gradient by layer: back through the whole model, all weights' sums and squares held."""
    views = {
        f"{block}.{name}": view for block, views in enumerate(model.linears) for name, view in views.items()
    }
    weights = {name: view.stored for name, view in views.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        with model.plan.holding(model.model):
            for tokens in text.tokens_NT:
                loss = next_token_loss(model.differentiable_logits(tokens[None], {}), tokens[None], None)
                for name, gradient in zip(
                    weights, torch.autograd.grad(loss, list(weights.values())), strict=True
                ):
                    sums[name] += gradient
                    squares[name] += gradient.square()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    count = len(text.tokens_NT)
    return {name: views[name].orient(sums[name].detach() / count) for name in compared(model)}


def compared(model: LoadedModel) -> list[str]:
    """The first layer of every fifth of the blocks: the means of all would weigh as much as what is measured."""
    step = max(1, len(model.blocks) // 5)
    return [f"{block}.{next(iter(model.linears[block]))}" for block in range(0, len(model.blocks), step)]


def by_block(model: LoadedModel, text: TextSet, folder: Path, *, on_disk: bool = False) -> dict[str, Tensor]:
    """Mean gradient by layer: `engine.gradients`."""
    gradients = ModelGradients(folder / "gradients")
    stores = Stores(model.plan.dtype, hidden_size_of(model.model), folder / "activations", on_disk)
    gradients.make(model, [text], model.linears, stores)
    places = [name.partition(".") for name in compared(model)]
    return {f"{block}.{name}": gradients.of(int(block))[name].mean for block, _, name in places}


def in_files(model: LoadedModel, text: TextSet, folder: Path) -> dict[str, Tensor]:
    """The same with the boundaries between blocks mapped to files."""
    return by_block(model, text, folder, on_disk=True)
