"""Gradients of a model's loss for every block weight: block by block against the whole model at once; seconds, memory, values.

SmolLM2-135M on windows of random tokens. Both give the mean and the mean square over windows of each weight's gradient.
'whole' goes back through the whole model a window at a time and adds up the gradients of all weights; 'by block' keeps
the boundaries between blocks and goes back a block at a time (`engine.gradients`), its results in files. They take turns
within a round; shown are medians over rounds and the largest difference of a mean, as a share of the largest mean.
Memory is the high-water mark beyond what lies there before a round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd
import psutil
import torch
from machine import machine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from reprune.build import build
from reprune.calibration.source import TextSet
from reprune.compose import compose_run
from reprune.engine.activations import Stores
from reprune.engine.gradients import ModelGradients
from reprune.model.description import hidden_size_of, load_tokenizer
from reprune.model.device import plan_device, release_memory
from reprune.model.loading import LoadedModel, load_model
from reprune.reconstruction.objective import next_token_loss
from reprune.resources import StageMeter
from reprune.seeding import generator

Way = Callable[[LoadedModel, TextSet, Path], dict[str, Tensor]]


def main() -> None:
    """Load, measure in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of the group `model`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    source = build(compose_run([f"model={given.model}"]).config["model"], "model")
    plan = plan_device(given.device, "float32", None, given.threads)
    plan.settle()
    model = load_model(source, load_tokenizer(source), plan)
    size = (given.windows, given.length)
    tokens = torch.randint(
        2, int(model.model.config.get_text_config().vocab_size), size, generator=generator(0, "benchmark")
    )
    text = TextSet("random", "calibration", tokens, ("random",), {"name": "random"}, "as_tokenised")
    ways: dict[str, Way] = {"whole": whole, "by block": by_block, "by block, boundaries in files": in_files}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[int]] = {name: [] for name in ways}
    means: dict[str, dict[str, Tensor]] = {}
    for number in range(given.rounds):
        for name, way in ways.items():
            print(f"round {number + 1} of {given.rounds}, {name}", file=sys.stderr)
            release_memory()
            with tempfile.TemporaryDirectory() as folder:
                meter, resting = StageMeter(plan), int(psutil.Process().memory_info().rss)
                with meter.stage(name):
                    found = way(model, text, Path(folder))
            seconds[name].append(meter.seconds[name])
            memory[name].append((meter.device_peak_bytes or meter.peak_bytes)[name] - resting)
            means[name] = found
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in ("", "seconds", "× whole", "MiB beyond rest", "largest difference"):
        shown.add_column(column, justify="right", no_wrap=True)
    rows = []
    for name, took in seconds.items():
        ratios = [mine / base for base, mine in zip(seconds["whole"], took, strict=True)]
        furthest = max(
            float((mean - means["whole"][layer]).abs().max() / means["whole"][layer].abs().max())
            for layer, mean in means[name].items()
        )
        rows.append(
            {
                "way": name, "seconds": median(took), "times_whole": median(ratios),
                "mib_beyond_rest": median(memory[name]) / 2**20, "largest_difference": furthest,
            }
        )  # fmt: skip
        shown.add_row(
            name, f"{median(took):.1f}", f"{median(ratios):.2f}", f"{median(memory[name]) / 2**20:.0f}", f"{furthest:.1e}"
        )  # fmt: skip
    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False)
    console.print(machine(plan.num_threads) if plan.kind == "cpu" else plan.name)
    console.print(f"{given.model}, float32, {given.windows} × {given.length} tokens, {given.rounds} rounds")
    console.print(shown)
    if given.csv is not None:
        facts = {name: getattr(given, name) for name in ("model", "windows", "length", "rounds")}
        where = machine(plan.num_threads) if plan.kind == "cpu" else plan.name
        pd.DataFrame(rows).assign(**facts, machine=where).to_csv(given.csv, index=False)


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


if __name__ == "__main__":
    main()
