"""Layer-wise reconstruction (LR) to its optimum: the masked least squares of every layer on top of any pruner's mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from reprune.engine.statistics import InputStatistics, if_definite
from reprune.errors import ConfigError, RunError, require_nonnegative, require_positive
from reprune.reconstruction.layerwise import Layerwise, Solved
from reprune.reconstruction.pairs import PairStatistics
from reprune.reconstruction.solvers import conjugate_gradients, exact

USUAL = 60
"""Iterations until the tolerance is met: the median over the layers of SmolLM2-135M in the runs of `evidence/main` is 58."""


@dataclass(kw_only=True)
class LeastSquares(Layerwise):
    """ŵ_K = (H)_KK⁻¹ (b)_K for every output row with kept set K.

    H = 2/n Σ x̂ x̂ᵀ + λI, λ = damp · mean(diag), dead inputs with H_jj = 1 as in SparseGPT. b = H w against the dense
    layer's output on the same inputs, b = 2/n Σ x̂ xᵀ w + λ w against its output on the dense chain's: dampening pulls
    to the dense weights w either way. Solved for all rows at once by conjugate gradients from the pruner's weights, at
    least `min_iterations`, until the share of the recoverable error that the last iterations still gained is below
    `tolerance`, which is small so that rounding stays small: on SmolLM2 a Gram that is off by 2e-7 moves the weights by
    5e-4 to 2e-3 when stopped at 1e-3, and mostly by less than 6e-5 at 1e-6. Or per row by Cholesky factorisations in
    float64 (`solver: exact`), which takes far longer.
    """

    damp: float = 0.01
    solver: Literal["conjugate_gradients", "exact"] = "conjugate_gradients"
    min_iterations: int = 20
    max_iterations: int = 400
    tolerance: float = 1e-6

    name: ClassVar[str] = "least_squares"
    reads_gram: ClassVar[bool] = True
    writes_bias: ClassVar[bool] = False
    paired: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_nonnegative(damp=self.damp)
        require_positive(
            min_iterations=self.min_iterations,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
        )
        if self.max_iterations < self.min_iterations:
            raise ConfigError(
                "max_iterations",
                f"below min_iterations, which is {self.min_iterations}",
                value=self.max_iterations,
            )

    @property
    def products(self) -> int:
        """See Layerwise: the right-hand side, the first residual, and `USUAL` iterations, if so many may be made."""
        return 2 + min(max(USUAL, self.min_iterations), self.max_iterations)

    @torch.no_grad()
    def solve(
        self,
        dense: Tensor,
        pruned: Tensor,
        keep: Tensor,
        statistics: InputStatistics,
        pairs: PairStatistics | None,
        place: str,
    ) -> Solved:
        """See Layerwise: the optimal weights, from the pruner's. RunError when H is not positive definite or not finite."""
        hessian, damping, notes = statistics.dampened(
            self.damp, if_definite, "least squares are singular", place
        )
        weight = dense.float()
        rhs = weight @ hessian
        if pairs is not None:
            assert pairs.cross is not None
            rhs = weight @ (pairs.cross.T * (2 / statistics.num_tokens)) + damping * weight
            rhs[:, statistics.dead] = weight[:, statistics.dead] * hessian.diagonal()[statistics.dead]
        start = torch.where(keep, pruned.float(), 0)
        told: dict[str, Any] = {"solver": self.solver, **({"notes": notes} if notes else {})}
        if self.solver == "exact":
            solved = exact(hessian, rhs, keep).float()
        else:
            found = conjugate_gradients(
                hessian, rhs, keep, start,
                min_iterations=self.min_iterations, max_iterations=self.max_iterations, tolerance=self.tolerance,
            )  # fmt: skip
            solved = found.weight
            told |= {"iterations": found.iterations, "excess_estimate": found.excess}
        if not bool(torch.isfinite(solved).all()):
            raise RunError(f"{place}: its least squares have no finite solution; raise layerwise.damp (now {self.damp:g})")  # fmt: skip
        return Solved(torch.where(keep, solved, 0), told=told)
