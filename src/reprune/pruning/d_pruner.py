"""Pruner `d_pruner` (Zhang et al., NAACL 2024, arXiv 2405.06275)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from reprune.errors import require_nonnegative
from reprune.pruning.contract import LayerContext, Needs, Pruned, ScorePruner
from reprune.sparsity.patterns import Group, Pattern


@dataclass(kw_only=True)
class DPruner(ScorePruner):
    """S_ij = |g̃ W + ½ (g̃ W)²|_ij, g̃ the gradient of the domain's loss plus λ Σ G_ij (W' − W)_ij², within the output row.

    G_ij = W_ij² / [2 (H⁻¹)_jj] is what removing the weight costs on general text, H = 2/n Σ x xᵀ. A
    step of length α on the domain's loss, W' − W = −α g, makes the second term λ α² Σ G g², whose gradient, with g² in
    place of the Hessian, is 2 λ α² G g · g²: so g̃ = g (1 + 2 λ α² G ḡ²), g the mean gradient on the domain's text and
    ḡ² the mean of its squares. `regularisation` is λ (0.1), `step` α (0.03), `damp` that of H.

    `domain` names the part of the mask data that is the domain's text (calibration=mixture): gradients are on it, H is of
    all other parts. With null both are on all mask data.

    Unlike the authors' code: that takes 2 λ α² G g² / 1000 for the second term of g̃ (g once less), W² / C_jj² from
    SparseGPT's sweep for G (C as there, W as updated by then), adds up |g̃ W + (g̃ W)² / 2000 + W³| over batches of
    the domain's text, and updates the weights in between.
    """

    domain: str | None = None
    regularisation: float = 0.1
    step: float = 0.03
    damp: float = 0.01

    within: ClassVar[Group] = Group.ROW

    def __post_init__(self) -> None:
        require_nonnegative(regularisation=self.regularisation, step=self.step, damp=self.damp)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Gram and gradients, the latter on the domain's text, the former on all other."""
        return Needs(gram=True, gradients=True, gradient_text=self.domain, statistics_without=self.domain)

    def identity(self) -> dict[str, Any]:
        """The fields, and what H is of where that is not all mask data."""
        return {**asdict(self), **({} if self.domain is None else {"general": "other_parts"})}

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        weight, gradients = layer.weight.float(), layer.loss_gradients
        factor, _ = self._factor(layer)
        # (H⁻¹)_jj from its Cholesky factor, H⁻¹ = Cᵀ C.
        general = weight.square() / (2 * factor.square().sum(dim=0))
        weighting = 1 + 2 * self.regularisation * self.step**2 * general * gradients.mean_square
        change = gradients.mean * weighting * weight
        return (change + 0.5 * change.square()).abs()

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        _, notes = self._factor(layer)
        return replace(super().prune(layer, pattern, sparsity), notes=notes)

    def _factor(self, layer: LayerContext) -> tuple[Tensor, list[str]]:
        """C with H⁻¹ = Cᵀ C, computed once for all layers that share the input, and remarks on its dampening."""
        return layer.inputs.inverse_factor(self.damp, f"block {layer.block}, layer {layer.name}")
