"""Statistics of layer inputs: one accumulator for all layers that see the same input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reprune.errors import RunError
from reprune.model.linears import LinearView

MAX_DAMP = 1.0


@dataclass
class InputStatistics:
    """Sums over the tokens that a layer saw: Σ x² [d_in] and Σ x xᵀ [d_in, d_in], float32."""

    num_tokens: int = 0
    sum_squares: Tensor | None = None
    gram: Tensor | None = None
    _factors: dict[float, tuple[Tensor, list[str]]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, inputs: Tensor, with_gram: bool) -> None:
        """Add the tokens of `inputs` [..., d_in]."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self.sum_squares is None:
            self.sum_squares = torch.zeros(x.shape[1], device=x.device)
            self.gram = torch.zeros(x.shape[1], x.shape[1], device=x.device) if with_gram else None
        self.num_tokens += len(x)
        self.sum_squares += x.square().sum(dim=0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ of every input feature, [d_in]."""
        assert self.sum_squares is not None
        return self.sum_squares.sqrt()

    @property
    def dead(self) -> Tensor:
        """Features that were never other than zero, bool [d_in]."""
        assert self.sum_squares is not None
        return self.sum_squares == 0

    def inverse_factor(self, damp: float, place: str) -> tuple[Tensor, list[str]]:
        """C, the upper Cholesky factor of (H + damp · mean(diag H) · I)⁻¹ with H = 2/n Σ x xᵀ, and remarks.

        Dead features get H_jj = 1. A factorisation that fails is tried again with ten times the dampening, which is
        remarked; RunError, naming `place`, when dampening by the mean itself does not help. Computed once for all
        layers that share the input.
        """
        if damp not in self._factors:
            self._factors[damp] = self._inverse_factor(damp, place)
        return self._factors[damp]

    def _inverse_factor(self, damp: float, place: str) -> tuple[Tensor, list[str]]:
        assert self.gram is not None
        hessian = self.gram * (2 / self.num_tokens)
        diagonal = hessian.diagonal()
        if not bool(torch.isfinite(diagonal).all()):
            raise RunError(f"{place}: the calibration activations are not finite; try dtype=float32")
        diagonal[self.dead] = 1
        mean = diagonal.mean()
        notes: list[str] = []
        tried = damp
        while True:
            damped = hessian.clone()
            damped.diagonal().add_(tried * mean)
            # H = U Uᵀ with U upper, from the Cholesky factor of H with rows and columns reversed; then C = U⁻¹:
            # one factorisation and one triangular solve instead of two factorisations and an inverse.
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                identity = torch.eye(len(damped), device=damped.device)
                factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
                if bool(torch.isfinite(factor).all()):
                    return factor, notes
            if tried >= MAX_DAMP:
                raise RunError(
                    f"{place}: the Hessian of its inputs cannot be factorised even with dampening {tried:g}; "
                    "use more calibration sequences or dtype=float32"
                )
            tried = min(MAX_DAMP, max(tried, 1e-3) * 10)
            notes.append(f"factorisation failed, tried again with dampening {tried:g}")


@contextmanager
def collecting(linears: Mapping[str, LinearView], with_gram: bool) -> Iterator[dict[str, InputStatistics]]:
    """Accumulate the input statistics of `linears` over all forward passes in the context.

    Layers that were given the very same tensor in the first pass (q, k and v; gate and up) share one accumulator.
    """
    collector = _Collector(with_gram)
    handles = [
        view.module.register_forward_pre_hook(collector.hook(name), with_kwargs=True)
        for name, view in linears.items()
    ]
    try:
        yield collector.found
    finally:
        for handle in handles:
            handle.remove()


class _Collector:
    def __init__(self, with_gram: bool) -> None:
        self.with_gram = with_gram
        self.found: dict[str, InputStatistics] = {}
        self.leaders: set[str] = set()
        # Held until the layer is met again, that is for the first pass, so that no address is used twice in it.
        # The version tells a tensor from the same one after it was changed in place.
        self.first_inputs: list[tuple[Tensor, int, str]] = []

    def hook(self, name: str) -> Any:
        def observe(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs = positional[0] if positional else next(iter(keywords.values()))
            if name in self.found:
                self.first_inputs.clear()
            else:
                self._meet(name, inputs)
            if name in self.leaders:
                self.found[name].add(inputs, self.with_gram)

        return observe

    def _meet(self, name: str, inputs: Tensor) -> None:
        for seen, version, leader in self.first_inputs:
            same_memory = seen.data_ptr() == inputs.data_ptr() and seen.shape == inputs.shape
            if same_memory and version == inputs._version:
                self.found[name] = self.found[leader]
                return
        self.first_inputs.append((inputs, inputs._version, name))
        self.leaders.add(name)
        self.found[name] = InputStatistics()
