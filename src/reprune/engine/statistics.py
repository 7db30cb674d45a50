"""Statistics of a layer's inputs, and what methods compute from them once for all layers that share an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reprune.errors import RunError
from reprune.ranks import Ranks

MAX_DAMP = 1.0
PANELS = 8
PANEL_COLUMNS = 192
STARVED = "no token was routed here: ranked by its weights alone"


@dataclass(frozen=True)
class Spectrum:
    """`hessian` = diag(s) Q diag(`values`) Qᵀ diag(s), Q the `vectors` and s the roots of its diagonal, `scale`; remarks."""

    hessian: Tensor
    values: Tensor
    vectors: Tensor
    notes: list[str]

    @property
    def scale(self) -> Tensor:
        """The root of the Hessian's diagonal, [d_in]."""
        return self.hessian.diagonal().sqrt()


@dataclass
class InputStatistics:
    """Sums over the tokens that a layer saw: Σ x, Σ x² [d_in], Σ x xᵀ [d_in, d_in], and remarks on them.

    The first two are float64, so that a variance is left of features whose mean is far larger than their deviation;
    on Apple's GPUs, which have none, and of the third it is float32.
    """

    num_tokens: int = 0
    sums: Tensor | None = None
    sum_squares: Tensor | None = None
    gram: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    _factors: dict[float, tuple[Tensor, list[str]]] = field(default_factory=dict)
    _inverses: dict[float, Tensor] = field(default_factory=dict)
    _spectra: dict[float, Spectrum] = field(default_factory=dict)

    @classmethod
    def of_no_token(cls, num_features: int, device: torch.device, with_gram: bool) -> InputStatistics:
        """Of inputs that are alike in all directions: what is known of an expert that no token was routed to."""
        gram = torch.eye(num_features, device=device) if with_gram else None
        zeros = torch.zeros(num_features, device=device)
        return cls(0, zeros, torch.ones(num_features, device=device), gram, [STARVED])

    @torch.no_grad()
    def add(self, inputs: Tensor, with_gram: bool) -> None:
        """Add the tokens of `inputs` [..., d_in]."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self.sum_squares is None:
            self._begin(x.shape[1], x.device, with_gram)
        self.num_tokens += len(x)
        assert self.sums is not None
        assert self.sum_squares is not None
        if len(x):
            # Around a value near their mean float32 is enough, so that only vectors are computed with in float64.
            near = x.mean(dim=0)
            rest = x - near
            offset, beside = near.to(self.sums), rest.sum(dim=0).to(self.sums)
            self.sums += beside + len(x) * offset
            self.sum_squares += rest.square_().sum(dim=0) + offset * (2 * beside + len(x) * offset)
        if self.gram is not None:
            add_products(self.gram, x)

    def _begin(self, num_features: int, device: torch.device, with_gram: bool) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(num_features, device=device, dtype=wide)
        self.sum_squares = torch.zeros_like(self.sums)
        self.gram = torch.zeros(num_features, num_features, device=device) if with_gram else None

    def sum_over(
        self, ranks: Ranks, num_tokens: int, num_features: int, device: torch.device, with_gram: bool
    ) -> None:
        """Make the sums those of all processes, which saw `num_tokens` together; one that saw none has zeros to add."""
        if self.sums is None or self.sum_squares is None:
            self._begin(num_features, device, with_gram)
        assert self.sums is not None
        assert self.sum_squares is not None
        ranks.sum_([self.sums, self.sum_squares, *([] if self.gram is None else [self.gram])])
        self.num_tokens = num_tokens

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ of every input feature, float32 [d_in]."""
        assert self.sum_squares is not None
        return self.sum_squares.sqrt().float()

    @property
    def mean(self) -> Tensor:
        """E[X_j] of every input feature, float32 [d_in]; zero where no token was seen."""
        assert self.sums is not None
        return (self.sums / max(1, self.num_tokens)).float()

    @property
    def variance(self) -> Tensor:
        """Var[X_j] = E[X_j²] − E[X_j]² of every input feature, float32 [d_in]."""
        assert self.sums is not None
        assert self.sum_squares is not None
        seen = max(1, self.num_tokens)
        return (self.sum_squares / seen - (self.sums / seen).square()).clamp(min=0).float()

    @property
    def dead(self) -> Tensor:
        """Features that were never other than zero, bool [d_in]."""
        assert self.sum_squares is not None
        return self.sum_squares == 0

    def factor(self, damp: float, place: str) -> tuple[Tensor, list[str]]:
        """U, upper, with U Uᵀ = H + damp · mean(diag H) · I and H = 2/n Σ x xᵀ; and remarks.

        Dead features get H_jj = 1. A factorisation that fails is tried again with ten times the dampening, which is
        remarked; RunError, naming `place`, when dampening by the mean itself does not help. Computed once for all
        layers that share the input.
        """
        if damp not in self._factors:
            upper, _, notes = self.dampened(damp, _upper_factor, "factorisation failed", place)
            self._factors[damp] = upper, notes
        return self._factors[damp]

    def inverse_factor(self, damp: float, place: str) -> tuple[Tensor, list[str]]:
        """C, the upper Cholesky factor of (U Uᵀ)⁻¹ with U as in `factor`, whose inverse it is; and the same remarks."""
        if damp not in self._inverses:
            upper, _ = self.factor(damp, place)
            identity = torch.eye(len(upper), device=upper.device)
            self._inverses[damp] = torch.linalg.solve_triangular(upper, identity, upper=True)
        return self._inverses[damp], self._factors[damp][1]

    def spectrum(self, damp: float, place: str) -> Spectrum:
        """H + damp · mean(diag H) · I, and its eigenvalues and eigenvectors once its diagonal is scaled to one.

        H and what happens to dead features and to a matrix that is singular as in `factor`. Computed once for
        all layers that share the input.
        """
        if damp not in self._spectra:
            self._spectra[damp] = self._spectrum(damp, place)
        return self._spectra[damp]

    def _spectrum(self, damp: float, place: str) -> Spectrum:
        hessian, _, notes = self.dampened(damp, if_definite, "the Gram matrix is singular", place)
        unit = _unit(hessian)
        # Apple's GPUs have no eigendecomposition.
        values, vectors = torch.linalg.eigh(unit.cpu() if unit.device.type == "mps" else unit)
        return Spectrum(hessian, values.clamp(min=0).to(unit.device), vectors.to(unit.device), notes)

    def dampened(
        self, damp: float, attempt: Callable[[Tensor], Tensor | None], failure: str, place: str
    ) -> tuple[Tensor, float, list[str]]:
        """What `attempt` makes of H + λI, with H = 2/n Σ x xᵀ and H_jj = 1 for dead features; λ; and remarks.

        λ = damp · mean(diag H). Where `attempt` gives None, damp grows tenfold, which is remarked as `failure`.
        RunError, naming `place`, when dampening by the mean itself does not help.
        """
        assert self.gram is not None
        hessian = self.gram * (2 / max(1, self.num_tokens))
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
            made = attempt(damped)
            if made is not None:
                return made, float(tried * mean), notes
            if tried >= MAX_DAMP:
                raise RunError(
                    f"{place}: {failure} even with dampening {tried:g}; "
                    "use more calibration sequences or dtype=float32"
                )
            tried = min(MAX_DAMP, max(tried, 1e-3) * 10)
            notes.append(f"{failure}, tried again with dampening {tried:g}")


def add_products(gram: Tensor, x: Tensor) -> None:
    """Add xᵀx by panels of columns, each from the diagonal on: what lies below it is what lies above."""
    width = max(PANEL_COLUMNS, -(-len(gram) // PANELS))
    for first in range(0, len(gram), width):
        panel, later = slice(first, first + width), slice(first + width, None)
        gram[panel, first:].addmm_(x[:, panel].T, x[:, first:])
        gram[later, panel] = gram[panel, later].T


def _upper_factor(hessian: Tensor) -> Tensor | None:
    """U, upper, with U Uᵀ = H, from the Cholesky factor of H with rows and columns reversed; None where there is none."""
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed or not bool(torch.isfinite(lower.diagonal().reciprocal()).all()):
        return None
    upper: Tensor = lower.flip(0, 1)
    return upper


def if_definite(hessian: Tensor) -> Tensor | None:
    """H where every pivot of its Cholesky factorisation, at unit diagonal, is larger than rounding makes it."""
    lower, failed = torch.linalg.cholesky_ex(_unit(hessian))
    definite = not failed and bool(lower.diagonal().square().min() > 10 * torch.finfo(hessian.dtype).eps)
    return hessian if definite else None


def _unit(hessian: Tensor) -> Tensor:
    """Rows and columns scaled so that the diagonal is one."""
    scale = hessian.diagonal().rsqrt()
    return hessian * scale * scale[:, None]
