"""Layer-wise reconstruction (LR) to its optimum: the masked least squares of every layer on top of any pruner's mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reprune.engine.statistics import InputStatistics
from reprune.errors import ConfigError, RunError, require_nonnegative, require_positive
from reprune.reconstruction.solvers import conjugate_gradients, exact


@dataclass
class PairStatistics:
    """Σ x̂ xᵀ [d_in, d_in], float32, over tokens that a layer saw as x in the dense chain and as x̂ in the pruned one."""

    cross: Tensor | None = None

    @torch.no_grad()
    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Add the tokens of two tensors [..., d_in] that belong together."""
        student_ND = student.reshape(-1, student.shape[-1]).float()
        teacher_ND = teacher.reshape(-1, teacher.shape[-1]).float()
        if self.cross is None:
            self.cross = torch.zeros(student_ND.shape[1], student_ND.shape[1], device=student_ND.device)
        self.cross.addmm_(student_ND.T, teacher_ND)


@dataclass(kw_only=True)
class LeastSquares:
    """ŵ_K = (H)_KK⁻¹ (b)_K for every output row with kept set K.

    H = 2/n Σ x̂ x̂ᵀ + λI, λ = damp · mean(diag), dead inputs with H_jj = 1 as in SparseGPT. b = H w against the dense
    layer's output on the same inputs, b = 2/n Σ x̂ xᵀ w + λ w against its output on the dense chain's: dampening pulls
    to the dense weights w either way. Solved for all rows at once by conjugate gradients from the pruner's weights, at
    least `min_iterations`, until the share of the recoverable error that the last iterations still gained is below
    `tolerance`, which is small so that rounding stays small: on SmolLM2 a Gram that is off by 2e-7 moves the weights by
    5e-4 to 2e-3 when stopped at 1e-3, and mostly by less than 6e-5 at 1e-6. Or per row by Cholesky factorisations in float64 (`solver: exact`), which takes far longer.
    """

    damp: float = 0.01
    solver: Literal["conjugate_gradients", "exact"] = "conjugate_gradients"
    min_iterations: int = 20
    max_iterations: int = 400
    tolerance: float = 1e-6

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

    @torch.no_grad()
    def solve(
        self,
        dense: Tensor,
        pruned: Tensor,
        keep: Tensor,
        statistics: InputStatistics,
        pairs: PairStatistics | None,
        place: str,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The optimal weights [d_out, d_in], float32, and what to record.

        `dense` is w, `pruned` the start, `keep` the mask, all [d_out, d_in]; `statistics` are of the student's inputs,
        `pairs` with the dense chain's where these are the target. Raises RunError, naming `place`, when H is not
        positive definite or not finite.
        """
        hessian, damping, notes = statistics.dampened(
            self.damp, _if_definite, "least squares are singular", place
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
        return torch.where(keep, solved, 0), told


def _if_definite(hessian: Tensor) -> Tensor | None:
    """H where every pivot of its Cholesky factorisation, at unit diagonal, is larger than rounding makes it."""
    scale = hessian.diagonal().rsqrt()
    lower, failed = torch.linalg.cholesky_ex(hessian * scale * scale[:, None])
    definite = not failed and bool(lower.diagonal().square().min() > 10 * torch.finfo(hessian.dtype).eps)
    return hessian if definite else None
