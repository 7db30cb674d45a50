"""How near one block's work comes to the arithmetic it cannot do without, and to the public codes' time for it.

One Llama block of random weights on random tokens, float32: SmolLM2-135M's shapes, or Llama-7B's. The floor of a stage is
its floating-point operations, each kind over the rate that bare matrix products of the same shape reach in the
same round:

    forward      the block's products and half of the attention's (it is causal)
    statistics   the same without the last layer, whose output nothing reads; for Grams tokens · d² a shared input
    SparseGPT    solve: d³/3 a shared input (one factorisation), rows · d² for the updates; whole: statistics, solve, forward
    Wanda        statistics and forward: choosing a mask has no product in it
    br_gp        training steps, batch of 8: three times the forward pass, 6 · weights · tokens beside the attention

Arms take turns within a round; shown are medians over rounds of seconds and of ratios within a round. `share` is floor
over ours; `times_reference` is the public codes' mathematics (benchmarks/reference_layers.py) over ours; `times_nearer`
is (reference − floor)/(ours − floor), how many times nearer to the floor we come. `rate` is GFLOP/s of bare products.
With --benchmark-timer=time.process_time seconds are the processor's, for one thread on a machine that does other work too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from reference_layers import (
    Reference,
    SparseGPTReference,
    WandaReference,
    reference_pass,
    reference_statistics,
)
from timing import Measure, Rows, Seconds
from torch import Tensor

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
LAYERS = {
    name: [(d, d), (d // heads * kept, d), (wide, d), (d, wide)]
    for name, (d, wide, heads, kept) in SHAPES.items()
}
"""[d_out, d_in] of the layers."""

SPARSITY = 0.5
Work = dict[str, Callable[[], Any]]
REFERENCE = ", reference"

SETTINGS = ("shapes", "windows", "length")


def arms(config: pytest.Config) -> list[str]:
    """Bare products, then ours and the reference's, then training."""
    shapes = set(LAYERS[config.getoption("shapes")])
    columns = {shape[1] for shape in shapes}
    names = [f"x W {rows}x{columns}" for rows, columns in sorted(shapes)]
    names += [f"{kind} {width}" for width in sorted(columns) for kind in ("x x", "H H")]
    stages = [
        "forward",
        *(f"{name} {part}" for name in ("SparseGPT", "Wanda") for part in ("statistics", "solve")),
    ]
    names += [f"{stage}{whose}" for stage in stages for whose in ("", REFERENCE)]
    return names if config.getoption("no_training") else [*names, "br_gp"]


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Bench:
    """The block."""
    given = request.config.getoption
    return Bench.of(given("shapes"), given("windows"), given("length"), given("threads"))


@pytest.fixture(scope="module")
def work(bench: Bench, request: pytest.FixtureRequest) -> Work:
    """What each arm does."""
    training = {} if request.config.getoption("no_training") else bench.training()
    return {**bench.products(), **bench.stages(), **training}


def test_arm(arm: str, work: Work, measure: Measure) -> None:
    """One arm in one round."""
    measure(work[arm])


def test_shares(bench: Bench, seconds: Seconds, told: Rows) -> None:
    """What the rounds come to."""
    told += bench.rows(seconds)


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

    def products(self) -> Work:
        """Bare products, whose seconds give the rate at each shape."""
        arms: Work = {}
        for rows, columns in {tuple(weight.shape) for weight in self.weights.values()}:
            x, weight = torch.randn(self.num_tokens, columns), torch.randn(rows, columns)
            arms[f"x W {rows}x{columns}"] = partial(torch.mm, x, weight.T)
        for columns in {weight.shape[1] for weight in self.weights.values()}:
            x, square = torch.randn(self.num_tokens, columns), torch.randn(columns, columns)
            arms[f"x x {columns}"] = partial(torch.mm, x.T, x)
            arms[f"H H {columns}"] = partial(torch.mm, square, square)
        return arms

    def stages(self) -> Work:
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

        arms: Work = {
            "forward": lambda: chains.through(0, chains.pruned),
            "forward, reference": lambda: reference_pass(partial(call.run, block), states),
        }
        for name in kinds:
            arms[f"{name} statistics"] = partial(statistics, name)
            arms[f"{name} statistics, reference"] = partial(reference, name)
            arms[f"{name} solve"] = partial(solve, name)
            arms[f"{name} solve, reference"] = partial(reference_solve, name)
        return arms

    def training(self) -> Work:
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
            *({"stage": f"product {name[4:]}", "rate": rate} for name, rate in rates.items()),
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


def without_factor(found: InputStatistics) -> InputStatistics:
    """The same sums, nothing computed from them yet."""
    return InputStatistics(found.num_tokens, found.sums, found.sum_squares, found.gram)
