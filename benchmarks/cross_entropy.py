"""Losses of tokens from all logits at once against logits of some positions at a time: tokens a second, memory, values.

SmolLM2-135M on windows of random tokens, which cost what text costs. 'whole' makes the logits of as many rows as fit
2^26 of them and takes the cross-entropy of all; the others send those rows through the blocks and then some positions
through the head. They take turns within a round; shown are medians over rounds of what was measured in the same one, and
the largest difference of any loss from 'whole'. Memory is the high-water mark beyond what lies there before a round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median

import psutil
import torch
from machine import machine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from reprune.build import build
from reprune.compose import compose_run
from reprune.model import head
from reprune.model.description import load_tokenizer
from reprune.model.device import plan_device
from reprune.model.likelihood import token_losses
from reprune.model.loading import LoadedModel, load_model
from reprune.resources import StageMeter
from reprune.seeding import generator

WHOLE = "whole"
WHOLE_LOGITS = 2**26
Losses = Callable[[LoadedModel, Tensor], Tensor]


def main() -> None:
    """Load, measure in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of the group `model`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--powers", type=int, nargs="+", default=[22, 24, 26], help="2^POWER logits at once")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    source = build(compose_run([f"model={given.model}"]).config["model"], "model")
    plan = plan_device(given.device, given.dtype, None, given.threads)
    plan.settle()
    model = load_model(source, load_tokenizer(source), plan)
    size = (given.windows, given.length)
    tokens = torch.randint(2, head.vocabulary_size(model), size, generator=generator(0, "benchmark"))
    ways: dict[str, Losses] = {
        WHOLE: whole_losses,
        **{f"2^{power}": chunked(2**power) for power in given.powers},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[int]] = {name: [] for name in ways}
    losses: dict[str, Tensor] = {}
    with plan.holding(model.model):
        for losses_of in ways.values():
            losses_of(model, tokens[:, :8])
        for number in range(given.rounds):
            for name, losses_of in ways.items():
                print(f"round {number + 1} of {given.rounds}, {name}", file=sys.stderr)
                meter, resting = StageMeter(plan), resting_bytes(model)
                with meter.stage(name):
                    losses[name] = losses_of(model, tokens)
                seconds[name].append(meter.seconds[name])
                memory[name].append((meter.device_peak_bytes or meter.peak_bytes)[name] - resting)
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in ("logits at once", "tokens a second", "× whole", "MiB beyond rest", "largest difference"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, took in seconds.items():
        ratios = [base / mine for base, mine in zip(seconds[WHOLE], took, strict=True)]
        shown.add_row(
            name,
            f"{tokens.numel() / median(took):.0f}",
            f"{median(ratios):.2f}",
            f"{median(memory[name]) / 2**20:.0f}",
            f"{float((losses[name] - losses[WHOLE]).abs().max()):.1e}",
        )
    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False)
    console.print(machine(plan.num_threads) if plan.kind == "cpu" else plan.name)
    console.print(
        f"{given.model}, {given.dtype}, {given.windows} × {given.length} tokens, {given.rounds} rounds"
    )
    console.print(shown)


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


def resting_bytes(model: LoadedModel) -> int:
    """Memory that is taken when nothing is computed."""
    if model.plan.kind == "cuda":
        return int(torch.cuda.memory_allocated(model.plan.device))
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
