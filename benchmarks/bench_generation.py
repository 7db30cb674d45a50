"""How many tokens a second the model writes, one text at a time and in batches, with a key-value cache in all.

The study's recipe on SmolLM2-135M, float32: prefixes of a random token and four greedy ones, sampling at temperature 1 to
the end-of-text token or --length tokens. Timed is the sampling; counted are the tokens that the texts keep, so that rows of a
batch which ended count for nothing. One text at a time is two texts one after the other. The sizes take turns
within a round, and the shown figures are medians over rounds of what was measured in the same one. The floor of a step is
its products of a row a text with every weight, which for few rows is the reading of the weights; attention to what is cached is left out.
"""

from __future__ import annotations

import time
from statistics import median

import pytest
import torch
from floors import BARE, bare_pass
from timing import Measure, Rows, Seconds
from torch import Tensor

from reprune.calibration.generated import Generated
from reprune.calibration.generation import draw, sample
from reprune.calibration.source import TextContext
from reprune.model.loading import LoadedModel
from reprune.seeding import generator

SIZES = {"1": 1, "8": 8, "16": 16, "32": 32, "64": 64}
SINGLE = 2

SETTINGS = ("model", "length")


def arms(config: pytest.Config) -> list[str]:
    """Texts at a time, and a step's products of as many rows."""
    return [name for size in SIZES for name in (size, f"{BARE}, {size}")]


@pytest.fixture(scope="module")
def starts(model: LoadedModel) -> Tensor:
    """As many beginnings as the largest batch has."""
    return beginnings(model, max(SIZES.values()))


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[int, int]]:
    """Tokens that were kept and steps, by arm: the same in every round."""
    return {}


def test_writing(
    arm: str,
    model: LoadedModel,
    starts: Tensor,
    measure: Measure,
    counted: dict[str, tuple[int, int]],
    request: pytest.FixtureRequest,
) -> None:
    """One arm in one round."""
    length, size = request.config.getoption("length"), SIZES[arm.removeprefix(f"{BARE}, ")]
    batches = starts[:SINGLE].split(1) if size == 1 else [starts[:size]]
    with model.plan.holding(model.model):
        if arm.startswith(BARE):
            measure(bare_pass(model, size, 0))
        else:
            found = measure(lambda: [written(model, batch, length) for batch in batches])
            # A text that ends draws a token more than it keeps.
            counted[arm] = sum(map(sum, found)), sum(min(length, max(texts) + 1) for texts in found)


def test_table(model: LoadedModel, seconds: Seconds, counted: dict[str, tuple[int, int]], told: Rows) -> None:
    """What the rounds come to."""
    rates = {name: [tokens / took for took in seconds[name]] for name, (tokens, _) in counted.items()}
    for name, found in rates.items():
        ratios = [rate / single for rate, single in zip(found, rates["1"], strict=True)]
        floors = [
            counted[name][1] * step / took
            for step, took in zip(seconds[f"{BARE}, {name}"], seconds[name], strict=True)
        ]
        told.append(
            {
                "texts at a time": name,
                "tokens_a_second": median(found),
                "share": median(floors),
                "times_one": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "ms_drawing_a_step": 1e3 * seconds_of_drawing(model, SIZES[name]),
            }
        )


def beginnings(model: LoadedModel, count: int) -> Tensor:
    """Prefixes of the study's recipe, of any language: int64 [count, tokens]."""
    recipe = Generated(language=None)
    context = TextContext(model.tokenizer, model, "calibration", 0, generator(0, "unused"), 0, "calibration")
    streams = [generator(0, "benchmark", text) for text in range(count)]
    with model.plan.holding(model.model):
        return recipe.starts(model, context, streams, 0).tokens_BT


def written(model: LoadedModel, starts: Tensor, max_new_tokens: int) -> list[int]:
    """Write texts behind `starts`; how many tokens each keeps."""
    streams = [generator(0, "benchmark sampling", text) for text in range(len(starts))]
    return list(map(len, sample(model, starts, streams, lambda place: 1.0, max_new_tokens)))


def seconds_of_drawing(model: LoadedModel, size: int) -> float:
    """What drawing one token for each of `size` texts takes, from probabilities that are there."""
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    odds = torch.softmax(torch.randn(size, vocabulary, generator=generator(0, "odds")), dim=-1)
    streams = [generator(0, "drawing", text) for text in range(size)]
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        draw(odds, streams)
        took.append(time.perf_counter() - begin)
    return median(took)
