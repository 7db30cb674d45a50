"""Masked least squares: the best kept weights of a linear layer, its mask held.

For every output row w with kept inputs K (SparseGPT, arXiv 2301.00774, eq. 1, with a dampened H):

    minimise ŵᵀ H ŵ − 2 bᵀ ŵ  over ŵ that are zero outside K,   so   ŵ_K = (H_KK)⁻¹ b_K.

All rows share H, the dampened Gram of the inputs that the pruned layer sees. The right-hand side has the layout of the
weight: W H where the layer is to do on its inputs what the dense one does, or with C = XᵀX̂ scaled like H, W C + λ W
where the dense layer's inputs X are others than the pruned one's X̂.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Decrements over so many iterations tell how much is left: a single one may be small by chance.
RECENT = 5
ORACLE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Solution:
    """A weight float32 [d_out, d_in], zero where not kept, and how it was reached.

    `excess` is what the last iterations still gained, as a share of all that was gained since the start, over all rows:
    an estimate of the share of the recoverable error that is left.
    """

    weight: Tensor
    iterations: int
    excess: float


@torch.no_grad()
def conjugate_gradients(
    hessian: Tensor,
    rhs: Tensor,
    keep: Tensor,
    start: Tensor | None,
    *,
    min_iterations: int = 20,
    max_iterations: int = 400,
    tolerance: float = 1e-6,
) -> Solution:
    """Conjugate gradients with the diagonal as preconditioner, all rows at once (Hestenes & Stiefel, 1952).

    `hessian` float32 [d_in, d_in] with a positive diagonal; `rhs` and `start` float32, `keep` bool [d_out, d_in]. Each
    row goes on from `start` (None: zero) in the space of its own kept weights, at the cost of one product of `rhs` with `hessian` an
    iteration for all of them. Step k lowers the error by α_k r_kᵀz_k; the iteration ends when the decrements of the
    last five steps fall below `tolerance` of all so far.
    """
    mask = keep.to(hessian.dtype)
    scale = hessian.diagonal().reciprocal()
    if start is None:
        weight, residual = torch.zeros_like(rhs), rhs * mask
    else:
        weight = torch.where(keep, start, 0)
        residual = (rhs - weight @ hessian).mul_(mask)
    direction = residual * scale
    # rᵀz, [d_out, 1]
    slope = (residual * direction).sum(dim=1, keepdim=True)
    decrements: list[Tensor] = []
    for _ in range(max_iterations):
        image = (direction @ hessian).mul_(mask)
        step = _ratio(slope, (direction * image).sum(dim=1, keepdim=True))
        weight.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        decrements.append((step * slope).sum())
        if len(decrements) >= min_iterations and _excess(decrements) < tolerance:
            break
        scaled = residual * scale
        previous, slope = slope, (residual * scaled).sum(dim=1, keepdim=True)
        direction.mul_(_ratio(slope, previous)).add_(scaled)
    return Solution(weight, len(decrements), _excess(decrements))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below; 0 for rows that have converged or keep nothing, where both are 0."""
    return torch.where(below == 0, 0, above / below)


def _excess(decrements: list[Tensor]) -> float:
    gained = torch.stack(decrements)
    total = float(gained.sum())
    # What is optimal from the start has gained nothing; a NaN must stay one.
    return 0.0 if total == 0 else float(gained[-RECENT:].sum()) / total


@torch.no_grad()
def exact(hessian: Tensor, rhs: Tensor, keep: Tensor) -> Tensor:
    """The minimum itself, float64 [d_out, d_in]: a Cholesky factorisation of M H M + (I − M) for each row.

    Arguments as of `conjugate_gradients`, any float dtype. Its cost is cubic in the kept weights for every single row.
    """
    hessian, rhs = hessian.double(), rhs.double()
    solution = torch.zeros_like(rhs)
    # Kept columns first: those that no row of a chunk keeps are left out, which saves most of the cubic cost.
    order = keep.argsort(dim=1, descending=True, stable=True)
    counts = keep.sum(dim=1)
    # A chunk's matrices, their factors and one copy.
    rows = max(1, ORACLE_BYTES // (3 * 8 * max(1, int(counts.max())) ** 2))
    for first in range(0, len(rhs), rows):
        chunk = slice(first, first + rows)
        columns = order[chunk, : int(counts[chunk].max())]
        kept = keep[chunk].gather(1, columns).double()
        matrices = hessian[columns[:, :, None], columns[:, None, :]]
        matrices *= kept[:, :, None] * kept[:, None, :]
        matrices.diagonal(dim1=1, dim2=2).add_(1 - kept)
        targets = rhs[chunk].gather(1, columns) * kept
        found = torch.cholesky_solve(targets[:, :, None], torch.linalg.cholesky(matrices))
        solution[chunk].scatter_(1, columns, found[:, :, 0])
    return solution


@torch.no_grad()
def energy(weight: Tensor, hessian: Tensor, rhs: Tensor) -> Tensor:
    """ŵᵀ H ŵ − 2 bᵀ ŵ of every row, float64 [d_out]: up to a constant the error, and exactly what is minimised."""
    weight, hessian, rhs = weight.double(), hessian.double(), rhs.double()
    return ((weight @ hessian - 2 * rhs) * weight).sum(dim=1)
