"""How near the least-squares solver comes to the optimum on a real model's layers, and what it costs.

For some blocks of SmolLM2-135M, every linear layer of them: H from web calibration text through the dense model (2/n Σ
x xᵀ, dampened by 1 % of its mean diagonal), masks from SparseGPT at 50 %, 70 % and 2:4. On each mask these are run one
after the other, all rows of the layer, float32:

    CG, 20       conjugate gradients from the masked dense weights m⊙w, 20 iterations
    CG, tol      the same until the solver's tolerance is met
    SparseGPT    the weights that its sweep leaves
    ADMM, 20     20 iterations, ρ = 1, H scaled to unit diagonal (Boža, 2024, arXiv 2401.02938), one factorisation

Printed is the excess, the share of the recoverable error that is left: (E(ŵ) − E*) / (E(m⊙w) − E*) with E(ŵ) =
(ŵ − w)ᵀ H (ŵ − w) in float64, summed over a layer's rows, and E* its minimum on that mask. 0 is optimal, 100 % is the
mask alone. Median and worst are over the layers of a shape, seconds their median: CG with W H, ADMM with its
factorisation, SparseGPT with its factorisation and with choosing the mask. E* takes a Cholesky factorisation a row, so
in layers with many inputs all energies are those of a sample of rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import pandas as pd
import torch
from machine import machine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from reprune.check import check
from reprune.compose import compose_run
from reprune.engine.collecting import collecting
from reprune.engine.statistics import InputStatistics
from reprune.model.loading import load_model
from reprune.pruning.contract import LayerContext
from reprune.pruning.sparsegpt import SparseGPT
from reprune.reconstruction.solvers import Solution, conjugate_gradients, energy, exact
from reprune.seeding import generator
from reprune.sparsity.patterns import KeptOfGroup, Pattern, Unstructured

DAMP = 0.01
WIDE = 1024
SPARSITIES: dict[str, tuple[Pattern, float]] = {
    "50 %": (Unstructured(), 0.5),
    "70 %": (Unstructured(), 0.7),
    "2:4": (KeptOfGroup(kept=2, group=4), 0.5),
}
ARMS = ("CG, 20", "CG, tol", "SparseGPT", "ADMM, 20")
Layers = dict[str, tuple[Tensor, InputStatistics]]
Result = TypeVar("Result")


def main() -> None:
    """Collect, solve, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of the group `model`")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=48, help=f"rows compared where d_in > {WIDE}")
    parser.add_argument("--csv", type=Path, help="where a row a layer, sparsity and arm is written")
    given = parser.parse_args()
    layers = collect(given.model, given.blocks, given.sequences, given.length)
    found: dict[tuple[str, tuple[int, ...]], list[dict[str, tuple[float, float, int]]]] = {}
    rows: list[dict[str, object]] = []
    for sparsity in SPARSITIES:
        for name, (weight, statistics) in layers.items():
            print(f"{sparsity} {name}", file=sys.stderr)
            shape = tuple(weight.shape)
            result = compare(name, weight, statistics, *SPARSITIES[sparsity], given.rows)
            found.setdefault((sparsity, shape), []).append(result)
            rows += [
                {
                    "sparsity": sparsity,
                    "layer": name,
                    "d_out": shape[0],
                    "d_in": shape[1],
                    "arm": arm,
                    "excess": excess,
                    "iterations": iterations,
                    "seconds": seconds,
                }
                for arm, (excess, seconds, iterations) in result.items()
            ]
    console = Console(width=150 if not sys.stdout.isatty() else None, highlight=False)
    console.print(machine(torch.get_num_threads()))
    console.print(
        f"{given.model}, blocks {given.blocks}, {given.sequences} × {given.length} tokens; excess in %, "
        f"{given.rows} rows of a layer compared where d_in > {WIDE}, else all"
    )
    console.print(table(found))
    if given.csv is not None:
        told = {"model": given.model, "sequences": given.sequences, "length": given.length}
        frame = pd.DataFrame(rows).assign(**told, machine=machine(torch.get_num_threads()))
        frame.to_csv(given.csv, index=False)


def collect(model_name: str, blocks: list[int], sequences: int, length: int) -> Layers:
    """Dense weight float32 [d_out, d_in] and input statistics of every linear layer of `blocks`."""
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        plan = check(
            compose_run(
                [
                    f"model={model_name}",
                    f"calibration.num_sequences={sequences}",
                    f"calibration.length={length}",
                    "reconstruction=none",
                    "evaluation=none",
                    "tracking=jsonl",
                    "dtype=float32",
                    "device=cpu",
                    *(f"~calibration@probes.{name}" for name in ("held_out", "wiki", "code")),
                    f"output_dir={folder}",
                ]
            )
        )
        plan.device.settle()
        model = load_model(plan.source, plan.tokenizer, plan.device)
        [text] = plan.texts(model).mask
    linears = {f"{block}.{name}": view for block in blocks for name, view in model.linears[block].items()}
    with collecting(linears, with_gram=True) as statistics, torch.no_grad():
        for tokens_BT in torch.split(text.tokens_NT, plan.device.sequences_a_pass(length)):
            model.base(input_ids=tokens_BT, use_cache=False)
    return {name: (view.weight.float(), statistics[name]) for name, view in linears.items()}


def compare(
    name: str, weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float, num_rows: int
) -> dict[str, tuple[float, float, int]]:
    """By arm: excess, seconds and iterations on SparseGPT's mask."""
    assert statistics.gram is not None
    # Without the factor that layers with the same input share, so that each is charged for it.
    own = InputStatistics(
        num_tokens=statistics.num_tokens, sum_squares=statistics.sum_squares, gram=statistics.gram
    )
    # SparseGPT takes the weights of dead inputs for zero.
    weight = weight.masked_fill(statistics.dead, 0)
    layer = LayerContext(name, 0, weight, own, generator(0, "benchmark"))
    pruned, sweep_seconds = timed(lambda: SparseGPT(damp=DAMP).prune(layer, pattern, sparsity))
    keep = pruned.keep
    masked = weight * keep
    hessian = statistics.gram * (2 / statistics.num_tokens)
    hessian.diagonal()[statistics.dead] = 1
    hessian.diagonal().add_(DAMP * hessian.diagonal().mean())

    def cg(iterations: int | None) -> Solution:
        rhs = weight @ hessian
        if iterations is None:
            return conjugate_gradients(hessian, rhs, keep, masked)
        return conjugate_gradients(hessian, rhs, keep, masked, max_iterations=iterations)

    twenty, twenty_seconds = timed(lambda: cg(20))
    tolerance, tolerance_seconds = timed(lambda: cg(None))
    split, split_seconds = timed(lambda: admm(hessian, weight @ hessian, keep, masked, 20))

    d_out, d_in = weight.shape
    rows = torch.arange(d_out)
    if d_in > WIDE:
        rows = torch.randperm(d_out, generator=generator(0, "rows", name))[:num_rows]
    rhs = weight[rows].double() @ hessian.double()

    def total(candidate: Tensor) -> float:
        return float(energy(candidate[rows], hessian, rhs).sum())

    best = float(energy(exact(hessian, rhs, keep[rows]), hessian, rhs).sum())
    recoverable = total(masked) - best

    def excess(candidate: Tensor) -> float:
        return (total(candidate) - best) / recoverable

    return {
        "CG, 20": (excess(twenty.weight), twenty_seconds, twenty.iterations),
        "CG, tol": (excess(tolerance.weight), tolerance_seconds, tolerance.iterations),
        "SparseGPT": (excess(pruned.weight), sweep_seconds, 1),
        "ADMM, 20": (excess(split), split_seconds, 20),
    }


def admm(
    hessian: Tensor, rhs: Tensor, keep: Tensor, start: Tensor, iterations: int, rho: float = 1.0
) -> Tensor:
    """Splitting into a free weight and a masked one, with one factorisation for all rows; [d_out, d_in]."""
    unit = hessian.diagonal().rsqrt()
    scaled = hessian * unit * unit[:, None]
    scaled.diagonal().add_(rho)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled))
    rhs = rhs * unit
    held = start / unit
    dual = torch.zeros_like(held)
    for _ in range(iterations):
        free = (rhs + rho * (held - dual)) @ inverse
        held = (free + dual) * keep
        dual += free - held
    return held * unit


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the seconds it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def table(found: dict[tuple[str, tuple[int, ...]], list[dict[str, tuple[float, float, int]]]]) -> Table:
    """A row for each sparsity and shape."""
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in ("sparsity", "d_out × d_in", "layers"):
        shown.add_column(f"\n{column}", justify="left" if column == "sparsity" else "right", no_wrap=True)
    for arm in ARMS:
        for column in ("median", "worst", *(("steps",) if arm == "CG, tol" else ()), "s"):
            heading = arm if column == "median" else ""
            shown.add_column(f"{heading}\n{column}", justify="right", no_wrap=True)
    for (sparsity, shape), results in found.items():
        cells = [sparsity, " × ".join(map(str, shape)), str(len(results))]
        for arm in ARMS:
            shares, seconds, iterations = zip(*(result[arm] for result in results), strict=True)
            cells += [f"{100 * median(shares):.2f}", f"{100 * max(shares):.2f}"]
            if arm == "CG, tol":
                cells.append(f"{min(iterations)}–{max(iterations)}")
            cells.append(f"{median(seconds):.2f}")
        shown.add_row(*cells)
    return shown


if __name__ == "__main__":
    main()
