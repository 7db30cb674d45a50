"""Allocation `adapt_pruner` (Pan et al., 2025, arXiv 2502.03460)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reprune.errors import require_nonnegative
from reprune.sparsity.allocation import ModelAllocation, ModelView
from reprune.sparsity.balance import shifted
from reprune.sparsity.similarity import block_means


@dataclass(kw_only=True)
class AdaptPruner(ModelAllocation):
    """s_b = clip(s − A·Ĩ_b), I_b = −mean over tokens of cos(x_in, x_out), Ĩ centred and scaled to [−1, 1].

    A is the `amplitude`: how far the block that turns its input least or most is from the mean. Shifted by what keeps
    the budget. Deviation: the paper measures I anew in every one of up to 50 small steps, each with A = 0.02, and adds
    the steps up. Here each block goes through all of its rounds before the next one is pruned, so I is measured once, on
    the dense model, and A is that of ten such steps.
    """

    amplitude: float = 0.2

    def __post_init__(self) -> None:
        require_nonnegative(amplitude=self.amplitude)

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        importance = block_means(view, lambda cosine: -cosine)
        mean = sum(importance.values()) / len(importance)
        largest = max(abs(value - mean) for value in importance.values()) or 1.0
        wished = view.layers.by_block(
            {block: -self.amplitude * (value - mean) / largest for block, value in importance.items()}
        )
        return [shifted(wished, view.layers.num_weights, sparsity) for sparsity in sparsities]
