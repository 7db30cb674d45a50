"""Allocation `erdos_renyi`: layers with few weights for their inputs and outputs stay denser."""

from __future__ import annotations

from dataclasses import dataclass

from reprune.sparsity.allocation import Layers, SizeAllocation
from reprune.sparsity.balance import dense_in_proportion


@dataclass(kw_only=True)
class ErdosRenyi(SizeAllocation):
    """1 − s_l = min(1, ε · (d_in + d_out) / (d_in · d_out)), ε from the budget (Mocanu et al., arXiv 1707.04780)."""

    def allocate(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """See SizeAllocation."""
        densities = {name: (d_in + d_out) / (d_in * d_out) for name, (d_out, d_in) in layers.shapes.items()}
        return dense_in_proportion(densities, layers.num_weights, sparsity)
