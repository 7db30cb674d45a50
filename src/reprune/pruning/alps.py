"""Pruner `alps` (Meng et al., 2024, arXiv 2406.07831)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.engine.statistics import Spectrum
from reprune.errors import require_nonnegative, require_positive
from reprune.pruning.contract import LayerContext, LayerShape, Needs, Pruned, rank_first, require_finite
from reprune.reconstruction.solvers import conjugate_gradients
from reprune.sparsity.patterns import Group, Pattern

ROUND = 3
"""Iterations of one ρ."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""What ρ grows by once at least that share of the kept weights has changed in a round."""

LEAST_CG_ITERATIONS = 10


@dataclass(kw_only=True)
class ALPS:
    """minimise ‖WX − ŴX‖² + λ‖W − Ŵ‖² over Ŵ of the pattern, by ADMM for the support and least squares on it.

    With H = 2/n Σ x xᵀ + λI, λ = damp · mean(diag H), scaled to unit diagonal, so that weights are in units of √H_jj,
    W̄ the dense weights and P(·) what the pattern keeps of the largest magnitudes over the whole matrix, an iteration is

        B ← W̄ + ρ (H + ρI)⁻¹ (D − U − W̄),   D ← P(B + U),   U ← B + U − D,

    which are the paper's steps with U = V/ρ, written so that nothing large cancels. It starts from D = P(W̄), U = 0. One
    eigendecomposition of H serves every ρ and all layers that share the input. Every third iteration ρ, at first `rho`,
    grows by 1.3, 1.2 or 1.1 where the support changed since by at least 10 %, 0.5 % or one of the kept weights; where it
    did not change, or after `iterations`, it is final. Its weights come from conjugate gradients with H's diagonal
    as preconditioner, from D on, until their last steps gain less than `cg_tolerance` of all gained, or after
    `cg_iterations`.

    Deviations: the authors' code takes 10 steps of conjugate gradients, lowers ρ and begins anew where the support does
    not change at first, and stops early on small changes; none of it is done here. Weights of dead inputs count as zero.
    """

    rho: float = 0.1
    damp: float = 0.01
    iterations: int = 300
    cg_iterations: int = 100
    cg_tolerance: float = 1e-6

    needs: ClassVar[Needs] = Needs(gram=True)

    def __post_init__(self) -> None:
        require_positive(rho=self.rho, iterations=self.iterations, cg_iterations=self.cg_iterations)
        require_nonnegative(damp=self.damp, cg_tolerance=self.cg_tolerance)

    def check(self, pattern: Pattern) -> None:
        """Every pattern will do."""

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """None: the iteration chooses."""
        return None

    @torch.no_grad()
    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        spectrum = layer.inputs.spectrum(self.damp, f"block {layer.block}, layer {layer.name}")
        weight = layer.weight.float().masked_fill(layer.inputs.dead, 0)
        scaled = weight * spectrum.scale
        require_finite(scaled, layer)
        keep, start, facts = self._support(scaled, spectrum, layer.removed, pattern, sparsity)
        found = conjugate_gradients(
            spectrum.hessian,
            weight @ spectrum.hessian,
            keep,
            start / spectrum.scale,
            min_iterations=min(LEAST_CG_ITERATIONS, self.cg_iterations),
            max_iterations=self.cg_iterations,
            tolerance=self.cg_tolerance,
        )
        require_finite(found.weight, layer)
        facts["cg_iterations"] = found.iterations
        return Pruned(found.weight.to(layer.weight.dtype), keep, spectrum.notes, facts)

    def _support(
        self, dense: Tensor, spectrum: Spectrum, removed: Tensor | None, pattern: Pattern, sparsity: float
    ) -> tuple[Tensor, Tensor, dict[str, int | float]]:
        """The mask, the weights D on it, both of `dense` in units of √H_jj, and what to record."""

        def largest(weight: Tensor) -> Tensor:
            return pattern.keep(rank_first(weight.abs(), removed), sparsity, Group.MATRIX)

        def pull_of(rho: float) -> Tensor:
            return (spectrum.vectors * (rho / (spectrum.values + rho))) @ spectrum.vectors.T

        rho, pull = self.rho, pull_of(self.rho)
        keep = before = largest(dense)
        sparse, dual = torch.where(keep, dense, 0), torch.zeros_like(dense)
        num_kept = max(1, int(keep.sum()))
        iteration = 0
        for iteration in range(1, self.iterations + 1):
            point = dense + (sparse - dual - dense) @ pull + dual
            keep = largest(point)
            sparse, dual = torch.where(keep, point, 0), point.masked_fill(keep, 0)
            if iteration % ROUND:
                continue
            changed, before = int((keep != before).sum()), keep
            if changed == 0:
                break
            growth = next(growth for share, growth in GROWTH if changed >= share * num_kept)
            # The multiplier V = ρU stays as it is.
            rho, dual = rho * growth, dual / growth
            pull = pull_of(rho)
        return keep, sparse, {"admm_iterations": iteration, "rho": rho}
