"""How near one block's work comes to the arithmetic it cannot do without, and to the public codes' time for it.

One Llama block of random weights on random tokens, float32: SmolLM2-135M's shapes, or Llama-7B's. The floor of a stage is
its floating-point operations, each kind over the rate that bare matrix products of the same shape reach in the
same round:

    forward      the block's products and half of the attention's (it is causal)
    statistics   the same without the last layer, whose output nothing reads; for Grams tokens · d² a shared input
    SparseGPT    solve: d³/3 a shared input (one factorisation), rows · d² for the updates; whole: statistics, solve, forward
    Wanda        statistics and forward: choosing a mask has no product in it
    br_gp        training steps, batch of 8: three times the forward pass, 6 · weights · tokens beside the attention

Arms take turns within a round; shown are medians over rounds of seconds and of ratios within a round. 'share' is floor
over ours; '× reference' is the public codes' mathematics (benchmarks/reference_layers.py) over ours; 'distance' is
(reference − floor)/(ours − floor), how many times nearer to the floor we come. With --clock cpu seconds are
those of the processor, for one thread on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import machine
from reference_layers import (
    Reference,
    SparseGPTReference,
    WandaReference,
    reference_pass,
    reference_statistics,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from reprune.calibration.source import TextSet
from reprune.engine.activations import Stores
from reprune.engine.chains import Chains
from reprune.engine.observing import collect
from reprune.engine.statistics import InputStatistics
from reprune.model.description import load_tokenizer
from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel, load_model
from reprune.model.tiny import TinyModel
from reprune.pruning.contract import LayerContext, Pruner
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.together import pruned_in_turn
from reprune.pruning.wanda import Wanda
from reprune.reconstruction.gradient import in_float32, train
from reprune.reconstruction.objective import Pairs, WindowObjective
from reprune.reconstruction.technique import Technique
from reprune.reconstruction.trainable import choose
from reprune.seeding import generator
from reprune.sparsity.patterns import Unstructured

SHAPES: dict[str, tuple[int, int, int, int]] = {
    "smollm2_135m": (576, 1536, 9, 3),
    "llama_7b": (4096, 11008, 32, 32),
}
"""Hidden size, intermediate size, heads, key-value heads."""

SPARSITY = 0.5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Arms = dict[str, Callable[[], Any]]


def main() -> None:
    """Make the block, measure in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", choices=list(SHAPES), default="smollm2_135m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument(
        "--no-training", action="store_true", help="leave the training steps out, which take memory"
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    bench = Bench.of(given.shapes, given.sequences, given.length, given.threads)
    arms = {**bench.products(), **bench.stages(), **({} if given.no_training else bench.training())}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    clock = CLOCKS[given.clock]
    for number in range(given.rounds + 1):
        for name, work in arms.items():
            print(f"round {number} of {given.rounds}, {name}", file=sys.stderr)
            start = clock()
            work()
            took = clock() - start
            # The first round warms up.
            if number:
                seconds[name].append(took)
    rows = bench.rows(seconds)
    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False)
    console.print(f"{machine(given.threads)}, {given.clock} clock")
    console.print(f"{given.shapes}, {given.sequences} × {given.length} tokens, {given.rounds} rounds")
    console.print(table(rows))
    if given.csv is not None:
        settings = {
            "machine": machine(given.threads),
            **{key: getattr(given, key) for key in ("shapes", "sequences", "length", "rounds", "clock")},
        }
        append(given.csv, [{**settings, **row} for row in rows])


@dataclass
class Bench:
    """One block, what enters it, and the arms that work on it."""

    model: LoadedModel
    chains: Chains
    text: TextSet
    weights: dict[str, Tensor]
    known: dict[str, Mapping[str, InputStatistics]] = field(default_factory=dict)
    references: dict[str, dict[str, Reference]] = field(default_factory=dict)

    @staticmethod
    def of(shapes: str, sequences: int, length: int, threads: int) -> Bench:
        """A block of these shapes, and random tokens."""
        hidden, intermediate, heads, key_values = SHAPES[shapes]
        source = TinyModel(
            num_blocks=1,
            hidden_size=hidden,
            config={
                "intermediate_size": intermediate,
                "num_attention_heads": heads,
                "num_key_value_heads": key_values,
                "max_position_embeddings": max(512, length),
            },
        )
        plan = plan_device("cpu", "float32", None, threads)
        plan.settle()
        model = load_model(source, load_tokenizer(source), plan)
        tokens = torch.randint(2, 258, (sequences, length), generator=generator(0, "benchmark"))
        text = TextSet("random", "calibration", tokens, ("random",), {"name": "random"}, "as_tokenised")
        chains = Chains(model, [text], Stores(plan.dtype, hidden, Path(), on_disk=False))
        weights = {name: view.weight.clone() for name, view in model.linears[0].items()}
        return Bench(model, chains, text, weights)

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return self.text.tokens_NT.numel()

    def products(self) -> Arms:
        """Bare products, whose seconds give the rate at each shape."""
        arms: Arms = {}
        for rows, columns in {tuple(weight.shape) for weight in self.weights.values()}:
            x, weight = torch.randn(self.num_tokens, columns), torch.randn(rows, columns)
            arms[f"x W {rows}x{columns}"] = partial(torch.mm, x, weight.T)
        for columns in {weight.shape[1] for weight in self.weights.values()}:
            x, square = torch.randn(self.num_tokens, columns), torch.randn(columns, columns)
            arms[f"x x {columns}"] = partial(torch.mm, x.T, x)
            arms[f"H H {columns}"] = partial(torch.mm, square, square)
        return arms

    def stages(self) -> Arms:
        """Ours and the reference's: passes, statistics, solves."""
        views, chains = self.model.linears[0], self.chains
        block, states = self.model.blocks[0], self.chains.pruned[self.text.key].states_NTH
        call = self.model.call(0, 1, states.shape[1])
        linears: Any = {name: view.module for name, view in views.items()}
        kinds: dict[str, tuple[Pruner, bool, type[Any]]] = {
            "SparseGPT": (SparseGPT(), True, SparseGPTReference),
            "Wanda": (Wanda(), False, WandaReference),
        }

        def statistics(name: str) -> None:
            self.known[name] = collect(chains, 0, chains.pruned, [self.text], views, kinds[name][1])

        def reference(name: str) -> None:
            run = partial(call.run, block)
            self.references[name] = reference_statistics(kinds[name][2], linears, run, states)

        def solve(name: str) -> None:
            # Without the factor of an earlier round.
            own = {id(found): without_factor(found) for found in self.known[name].values()}
            layers = {
                layer: LayerContext(layer, 0, self.weights[layer], own[id(found)], generator(0, "benchmark"))
                for layer, found in self.known[name].items()
            }
            shares = dict.fromkeys(layers, SPARSITY)
            for _ in pruned_in_turn(kinds[name][0], layers, Unstructured(), shares):
                pass

        def reference_solve(name: str) -> None:
            for layer, found in self.references[name].items():
                found.prune(self.weights[layer], SPARSITY)

        arms: Arms = {
            "forward": lambda: chains.through(0, chains.pruned),
            "forward, reference": lambda: reference_pass(partial(call.run, block), states),
        }
        for name in kinds:
            arms[f"{name} statistics"] = partial(statistics, name)
            arms[f"{name} statistics, reference"] = partial(reference, name)
            arms[f"{name} solve"] = partial(solve, name)
            arms[f"{name} solve, reference"] = partial(reference_solve, name)
        return arms

    def training(self) -> Arms:
        """An epoch of br_gp on the block at half of its weights."""
        technique = Technique(epochs=1, batch_size=min(8, len(self.text.tokens_NT)))
        source = self.chains.pruned[self.text.key]
        target = self.chains.through(0, self.chains.pruned)[self.text.key]
        objective = WindowObjective(
            self.model, range(1), Pairs([source], [target]), technique.loss, technique.token_weight
        )
        model, views = self.model, self.model.linears[0]
        kept = {
            name: views[name].orient(Unstructured().keep(weight.abs(), SPARSITY, Wanda.within))
            for name, weight in self.weights.items()
        }

        def steps() -> None:
            with in_float32(model, [model.blocks[0]]):
                trained = choose(0, model.blocks[0], views, kept, technique.trainable, None)
                train(objective, None, [trained], technique, generator(0, "steps"), lambda: None, "benchmark")

        return {"br_gp": steps}

    def floors(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Seconds that each stage cannot do without, from those of one round's bare products."""
        tokens, shapes = self.num_tokens, {name: tuple(weight.shape) for name, weight in self.weights.items()}
        products = {name: seconds[f"x W {rows}x{columns}"] for name, (rows, columns) in shapes.items()}
        hidden = next(iter(shapes.values()))[1]
        length = self.text.tokens_NT.shape[1]
        # Scores and sums of a token see (length + 1)/2 others, by the rate of a hidden × hidden product.
        attention = (length + 1) / hidden * seconds[f"x W {hidden}x{hidden}"]
        forward = sum(products.values()) + attention
        observed = forward - products[list(products)[-1]]
        gram, solve = 0.0, 0.0
        known = self.known["SparseGPT"]
        leaders = {id(found): name for name, found in known.items()}
        for name in leaders.values():
            columns = shapes[name][1]
            gram += seconds[f"x x {columns}"] / 2
            solve += seconds[f"H H {columns}"] / 6
        for rows, columns in shapes.values():
            solve += seconds[f"x W {rows}x{columns}"] * columns / tokens / 2
        floors = {
            "forward": forward,
            "SparseGPT statistics": observed + gram,
            "SparseGPT solve": solve,
            "Wanda statistics": observed,
        }
        floors["SparseGPT"] = floors["SparseGPT statistics"] + solve + forward
        floors["Wanda"] = observed + forward
        floors["br_gp"] = 3 * forward
        return floors

    def rows(self, seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
        """A row for each stage: medians over rounds."""
        rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
        for one in rounds:
            for name in ("SparseGPT", "Wanda"):
                for whose in ("", ", reference"):
                    parts = (f"{name} statistics{whose}", f"{name} solve{whose}", f"forward{whose}")
                    one[f"{name}{whose}"] = sum(one[part] for part in parts)
        floors = [self.floors(one) for one in rounds]
        rows = []
        for stage in STAGES:
            if stage not in rounds[0]:
                continue
            row: dict[str, Any] = {"stage": stage}
            ours, base = [one[stage] for one in rounds], [one.get(f"{stage}, reference") for one in rounds]
            least = [floor.get(stage) for floor in floors]
            row["seconds"] = median(ours)
            row["floor_seconds"] = median(f for f in least if f is not None) if least[0] else None
            row["share"] = (
                median(f / own for f, own in zip(least, ours, strict=True) if f) if least[0] else None
            )
            if base[0] is not None:
                pairs = [(b, own, f) for b, own, f in zip(base, ours, least, strict=True) if b is not None]
                row["reference_seconds"] = median(b for b, _, _ in pairs)
                row["times_reference"] = median(b / own for b, own, _ in pairs)
                if least[0]:
                    row["times_nearer"] = median((b - f) / (own - f) for b, own, f in pairs if f)
            rows.append(row)
        flops = {
            name: 2 * self.num_tokens * rows_ * columns
            for rows_, columns in {tuple(weight.shape) for weight in self.weights.values()}
            for name in [f"x W {rows_}x{columns}"]
        }
        rates = {name: count / median(seconds[name]) / 1e9 for name, count in flops.items()}
        return [
            *rows,
            *({"stage": f"rate {name[4:]}, GFLOP/s", "rate": rate} for name, rate in rates.items()),
        ]


STAGES = (
    "forward",
    "SparseGPT statistics",
    "SparseGPT solve",
    "SparseGPT",
    "Wanda statistics",
    "Wanda solve",
    "Wanda",
    "br_gp",
)
COLUMNS = (
    "stage", "seconds", "floor_seconds", "share", "reference_seconds", "times_reference", "times_nearer", "rate",
)  # fmt: skip


def without_factor(found: InputStatistics) -> InputStatistics:
    """The same sums, nothing computed from them yet."""
    return InputStatistics(found.num_tokens, found.sums, found.sum_squares, found.gram)


def table(rows: list[dict[str, Any]]) -> Table:
    """All rows but those of the rates, which stand beside the machine."""
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in ("", "ms", "floor", "share", "reference ms", "× reference", "× nearer", "GFLOP/s"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["stage"]]
        for column, factor, form in (
            ("seconds", 1e3, ".1f"), ("floor_seconds", 1e3, ".1f"), ("share", 100, ".0f"),
            ("reference_seconds", 1e3, ".1f"), ("times_reference", 1, ".2f"), ("times_nearer", 1, ".1f"), ("rate", 1, ".0f"),
        ):  # fmt: skip
            value = row.get(column)
            cells.append("" if value is None else f"{factor * value:{form}}")
        shown.add_row(*cells)
    return shown


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file, which is made with a header where it is not there."""
    fields = ["machine", "shapes", "sequences", "length", "rounds", "clock", *COLUMNS]
    there = path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields, lineterminator="\n")
        if not there:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            )


if __name__ == "__main__":
    main()
