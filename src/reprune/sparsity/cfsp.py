"""Allocation `cfsp`: the part between blocks of CFSP (Wang et al., 2024, arXiv 2409.13199)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, pi

from reprune.errors import require_nonnegative
from reprune.sparsity.allocation import ModelAllocation, ModelView
from reprune.sparsity.balance import dense_in_proportion
from reprune.sparsity.similarity import block_means


@dataclass(kw_only=True)
class CFSP(ModelAllocation):
    """1 − s_b = (1 − s)·z_b/mean z, z_b = sigmoid(sharpness·(I_b − mean I)), I_b the mean over tokens of ∠(x_in, x_out)/π.

    Clipped to [0, 1) and scaled by what keeps the budget. The angle is a mean over tokens, so that the allocation does
    not depend on how many there are. The authors' code sums instead, and divides by 10⁴ before the sigmoid: with its
    128 × 1024 tokens that is the default sharpness of 13.1. CFSP itself removes MLP channels; here every layer of a
    block has the block's sparsity, whatever the pruner.
    """

    sharpness: float = 13.1

    def __post_init__(self) -> None:
        require_nonnegative(sharpness=self.sharpness)

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        # Rounding takes a cosine beyond 1.
        angles = block_means(view, lambda cosine: cosine.clamp(-1, 1).arccos() / pi)
        mean = sum(angles.values()) / len(angles)
        kept = {block: _sigmoid(self.sharpness * (angle - mean)) for block, angle in angles.items()}
        wished = view.layers.by_block(kept)
        return [dense_in_proportion(wished, view.layers.num_weights, sparsity) for sparsity in sparsities]


def _sigmoid(value: float) -> float:
    # Bounded, so that no sharpness makes a density zero.
    return 1 / (1 + exp(min(-value, 30.0)))
