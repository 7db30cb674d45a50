"""Allocation `owl` (Yin et al., 2023, arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.errors import RunError, require_nonnegative, require_positive
from reprune.pruning.contract import LayerContext
from reprune.sparsity.allocation import DenseBlock, ModelAllocation, ModelView
from reprune.sparsity.balance import shifted


@dataclass(kw_only=True)
class OWL(ModelAllocation):
    """s_b = s − (r_b − mean r), r_b = 2λ(D_b − min D)/(max D − min D), so that blocks with more outliers lose less.

    D_b is the share of entries of A_ij = |W_ij|·‖X_j‖₂ that exceed `outlier` (the paper's M) times the mean of A, over
    all layers of the block together, on the dense model's activations. All layers of a block have the same sparsity.
    Clipped to [0, 1) and shifted by what keeps the budget, which the mean over blocks does only where they are alike.
    """

    outlier: float = 5.0
    strength: float = 0.08

    def __post_init__(self) -> None:
        require_positive(outlier=self.outlier)
        require_nonnegative(strength=self.strength)

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        outliers = {block.index: self._share(block) for block in view.visit(norm=True) if block.layers}
        least, most = min(outliers.values()), max(outliers.values())
        span = most - least if most > least else 1.0
        kept = {block: 2 * self.strength * (share - least) / span for block, share in outliers.items()}
        wished = view.layers.by_block({block: -more for block, more in kept.items()})
        return [shifted(wished, view.layers.num_weights, sparsity) for sparsity in sparsities]

    def _share(self, block: DenseBlock) -> float:
        """D_b. A matrix is made twice rather than all of a block's held at once."""
        layers = list(block.layers.values())
        count = sum(layer.weight.numel() for layer in layers)
        mean = sum(float(_outputs(layer).sum(dtype=torch.float64)) for layer in layers) / count
        if not mean < float("inf"):
            raise RunError(
                f"block {block.index}: weights times activations are not finite; try dtype=float32"
            )
        return sum(int((_outputs(layer) > self.outlier * mean).sum()) for layer in layers) / count


def _outputs(layer: LayerContext) -> Tensor:
    """A, float32 [d_out, d_in]."""
    return layer.weight.float().abs() * layer.inputs.norm
