"""How near the least-squares solver comes to the optimum on a real model's layers, and what it costs.

For some blocks of SmolLM2-135M, every linear layer of them: H from web calibration text through the dense model (2/n Σ
x xᵀ, dampened by 1 % of its mean diagonal), masks from SparseGPT at 50 %, 70 % and 2:4. On each mask these are run one
after the other, all rows of the layer, float32:

    CG, 20       conjugate gradients from the masked dense weights m⊙w, 20 iterations
    CG, tol      the same until the solver's tolerance is met
    SparseGPT    the weights that its sweep leaves
    ADMM, 20     20 iterations, ρ = 1, H scaled to unit diagonal (Boža, 2024, arXiv 2401.02938), one factorisation

Told is the excess, what is left of the recoverable error: (E(ŵ) − E*) / (E(m⊙w) − E*) with E(ŵ) =
(ŵ − w)ᵀ H (ŵ − w) in float64, summed over a layer's rows, and E* its minimum on that mask. 0 is optimal, 1 is the
mask alone. Median and worst are over the layers of a shape, seconds their median: CG with W H, ADMM with its
factorisation, SparseGPT with its factorisation and with choosing the mask. E* takes a Cholesky factorisation a row, so
in layers with many inputs all energies are those of a sample of rows. An arm is a sparsity: its layers one after the
other. The floor of a solver is its products with H at the rate of a bare W H, and its factorisations, by their
operations, at that of a bare H H, both measured beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
import torch
from timing import Measure, Rows
from torch import Tensor

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
CG_20, CG, SWEEP, ADMM_20 = "CG, 20", "CG, tol", "SparseGPT", "ADMM, 20"
ROWS = 48
"""Rows of a layer that are compared where it has more than WIDE inputs."""
Layers = dict[str, tuple[Tensor, InputStatistics]]
Result = TypeVar("Result")

SETTINGS = ("model", "blocks", "windows", "length")
ONE_ROUND = True


def arms(config: pytest.Config) -> list[str]:
    """Sparsities of the masks."""
    return list(SPARSITIES)


@pytest.fixture(scope="module")
def layers(request: pytest.FixtureRequest) -> Layers:
    """The layers of the blocks asked for."""
    given = request.config.getoption
    return collect(given("model"), given("blocks"), given("windows"), given("length"), given("threads"))


def test_solvers(arm: str, layers: Layers, measure: Measure, rows: Rows, kept: Rows) -> None:
    """All layers at one sparsity."""
    pattern, sparsity = SPARSITIES[arm]

    def work() -> Rows:
        return [
            {"sparsity": arm, "layer": name, "d_out": len(weight), "d_in": weight.shape[1], **row}
            for name, (weight, statistics) in layers.items()
            for row in compare(name, weight, statistics, pattern, sparsity, ROWS)
        ]

    found = measure(work)
    rows += found
    kept += found


def test_table(rows: Rows, printed: Rows) -> None:
    """Over the layers of a shape: median and worst excess, medians of seconds and shares."""
    shapes: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        key = (row["sparsity"], f"{row['d_out']} × {row['d_in']}", row["solver"])
        shapes.setdefault(key, []).append(row)
    for (sparsity, shape, solver), own in shapes.items():
        excess, steps = [row["excess"] for row in own], [row["iterations"] for row in own]
        printed.append(
            {
                "sparsity": sparsity,
                "d_out × d_in": shape,
                "solver": solver,
                "left_%_median": f"{100 * median(excess):.2f}",
                "worst": f"{100 * max(excess):.2f}",
                "iterations": f"{min(steps)}–{max(steps)}",
                "seconds": median(row["seconds"] for row in own),
                "share": median(row["share"] for row in own),
            }
        )


def collect(model_name: str, blocks: list[int], sequences: int, length: int, threads: int) -> Layers:
    """Dense weight float32 [d_out, d_in] and input statistics of every linear layer of `blocks`."""
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
                    f"threads={threads}",
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
) -> Rows:
    """A row a solver: excess, seconds, share of the floor and iterations on SparseGPT's mask."""
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

    # Thrice, since the first touches its memory.
    passes = min(timed(lambda: weight @ hessian)[1] for _ in range(3))
    square = min(timed(lambda: hessian @ hessian)[1] for _ in range(3))
    # Cholesky takes a sixth of a square product's operations, an inverse from it two more; the sweep half a W H.
    found = (
        (CG_20, twenty.weight, twenty_seconds, twenty.iterations, (twenty.iterations + 1) * passes),
        (CG, tolerance.weight, tolerance_seconds, tolerance.iterations, (tolerance.iterations + 1) * passes),
        (SWEEP, pruned.weight, sweep_seconds, 1, square / 6 + passes / 2),
        (ADMM_20, split, split_seconds, 20, square / 2 + 21 * passes),
    )
    return [
        {
            "solver": solver,
            "excess": excess(solved),
            "iterations": iterations,
            "seconds": seconds,
            "share": floor / seconds,
        }
        for solver, solved, seconds, iterations, floor in found
    ]


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
