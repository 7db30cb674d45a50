"""The layer mathematics of SparseGPT's and Wanda's public codes, in words of our own, for benchmarks/bench_speed.py.

What they do, known from their publications, and nothing of their code: a pass of one sequence at a time for the
statistics of every layer by itself, a layer pruned by itself, and another pass of one sequence at a time for the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

BLOCK = 128
DAMP = 0.01


class Reference(Protocol):
    """Statistics of one layer's inputs, and what is made of its weight."""

    def __init__(self, num_features: int) -> None: ...

    def add(self, inputs: Tensor) -> None:
        """One sequence [tokens, d_in]."""

    def prune(self, weight: Tensor, sparsity: float) -> Tensor:
        """The new weight [d_out, d_in]."""


class SparseGPTReference:
    """A Hessian for each layer, rescaled at every sequence; one column after the other within blocks of 128."""

    def __init__(self, num_features: int) -> None:
        self.hessian = torch.zeros(num_features, num_features)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """H ← n/(n+1) H + 2/(n+1) x xᵀ."""
        self.hessian *= self.count / (self.count + 1)
        self.count += 1
        columns = inputs.T * (2 / self.count) ** 0.5
        self.hessian += columns @ columns.T

    def prune(self, weight: Tensor, sparsity: float) -> Tensor:
        """The column loop; the mask of a block by its threshold."""
        weight, hessian = weight.clone(), self.hessian.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0
        hessian.diagonal().add_(DAMP * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            inner = factor[start:stop, start:stop]
            block, done = weight[:, start:stop].clone(), torch.zeros(len(weight), stop - start)
            errors = torch.zeros_like(done)
            scores = block**2 / inner.diagonal() ** 2
            threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
            removed = scores <= threshold
            for column in range(stop - start):
                current = block[:, column]
                new = current.clone()
                new[removed[:, column]] = 0
                done[:, column] = new
                error = (current - new) / inner[column, column]
                block[:, column:] -= error[:, None] @ inner[column, None, column:]
                errors[:, column] = error
            weight[:, start:stop] = done
            weight[:, stop:] -= errors @ factor[start:stop, stop:]
        return weight


class WandaReference:
    """A running mean of squared norms for each layer; every row sorted, its lowest scattered into a mask."""

    def __init__(self, num_features: int) -> None:
        self.squares = torch.zeros(num_features)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """s ← n/(n+1) s + ‖x_j‖²/(n+1)."""
        self.squares *= self.count / (self.count + 1)
        self.count += 1
        self.squares += inputs.T.norm(p=2, dim=1) ** 2 / self.count

    def prune(self, weight: Tensor, sparsity: float) -> Tensor:
        """Row by row the lowest |W|·√s go."""
        scores = weight.abs() * self.squares.sqrt()
        order = scores.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
        removed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        new = weight.clone()
        new[removed] = 0
        return new


@torch.no_grad()
def reference_statistics(
    kind: Callable[[int], Reference],
    linears: Mapping[str, nn.Linear],
    run: Callable[[Tensor], Tensor],
    states_NTH: Tensor,
) -> dict[str, Reference]:
    """By layer, from a pass of each sequence by itself."""
    found = {name: kind(linear.in_features) for name, linear in linears.items()}

    def adding(name: str) -> Any:
        return lambda module, given, output: found[name].add(given[0].flatten(0, -2))

    handles = [linear.register_forward_hook(adding(name)) for name, linear in linears.items()]
    try:
        reference_pass(run, states_NTH)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def reference_pass(run: Callable[[Tensor], Tensor], states_NTH: Tensor) -> Tensor:
    """The outputs of a block, one sequence at a time."""
    outputs = torch.empty_like(states_NTH)
    for number, states in enumerate(states_NTH):
        outputs[number] = run(states[None])[0]
    return outputs
