"""How many tokens a second the model writes, one text at a time and in batches, with a key-value cache in all.

The study's recipe on SmolLM2-135M, float32: prefixes of a random token and four greedy ones, sampling at temperature 1 to
the end-of-text token or --tokens. Timed is the sampling; counted are the tokens that the texts keep, so that rows of a
batch which ended count for nothing. One text at a time is --single texts one after the other. The sizes take turns
within a round, and the shown figures are medians over rounds of what was measured in the same one.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch
from machine import machine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from reprune.build import build
from reprune.calibration.generated import Generated
from reprune.calibration.generation import draw, sample
from reprune.calibration.source import TextContext
from reprune.compose import compose_run
from reprune.model.description import load_tokenizer
from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel, load_model
from reprune.seeding import generator


def main() -> None:
    """Load, sample, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of the group `model`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--single", type=int, default=2, help="texts written one at a time in each round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    source = build(compose_run([f"model={given.model}"]).config["model"], "model")
    plan = plan_device(given.device, "float32", None, None)
    plan.settle()
    model = load_model(source, load_tokenizer(source), plan)
    starts = beginnings(model, max([*given.sizes, given.single]))
    rates: dict[int, list[float]] = {size: [] for size in (1, *given.sizes)}
    with plan.holding(model.model):
        written(model, starts[:1], 2)
        for number in range(given.rounds):
            for size, found in rates.items():
                print(f"round {number + 1} of {given.rounds}, {size} at a time", file=sys.stderr)
                if size == 1:
                    done = [written(model, one, given.tokens) for one in starts[: given.single].split(1)]
                else:
                    done = [written(model, starts[:size], given.tokens)]
                found.append(sum(tokens for tokens, _ in done) / sum(seconds for _, seconds in done))
        shown = table(rates, model)
    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False)
    console.print(machine(plan.num_threads) if plan.kind == "cpu" else plan.name)
    console.print(f"{given.model}, up to {given.tokens} tokens a text, {given.rounds} rounds")
    console.print(shown)


def beginnings(model: LoadedModel, count: int) -> Tensor:
    """Prefixes of the study's recipe, of any language: int64 [count, tokens]."""
    recipe = Generated(language=None)
    context = TextContext(model.tokenizer, model, "calibration", 0, generator(0, "unused"), 0, "calibration")
    streams = [generator(0, "benchmark", text) for text in range(count)]
    with model.plan.holding(model.model):
        return recipe.starts(model, context, streams, 0).tokens_BT


def written(model: LoadedModel, starts: Tensor, max_new_tokens: int) -> tuple[int, float]:
    """Tokens that the texts behind `starts` keep, and the seconds it took to write them."""
    streams = [generator(0, "benchmark sampling", text) for text in range(len(starts))]
    begin = time.perf_counter()
    texts = sample(model, starts, streams, lambda place: 1.0, max_new_tokens)
    return sum(map(len, texts)), time.perf_counter() - begin


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


def table(rates: dict[int, list[float]], model: LoadedModel) -> Table:
    """A row for each batch size."""
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in (
        "texts at a time",
        "tokens a second",
        "× one at a time",
        "lowest – highest",
        "ms drawing a step",
    ):
        shown.add_column(column, justify="right", no_wrap=True)
    for size, found in rates.items():
        ratios = [rate / single for rate, single in zip(found, rates[1], strict=True)]
        shown.add_row(
            str(size),
            f"{median(found):.1f}",
            f"{median(ratios):.1f}",
            f"{min(ratios):.1f} – {max(ratios):.1f}",
            f"{1e3 * seconds_of_drawing(model, size):.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
