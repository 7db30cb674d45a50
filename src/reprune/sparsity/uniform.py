"""Allocation `uniform`: the same sparsity for every layer."""

from __future__ import annotations

from dataclasses import dataclass

from reprune.sparsity.allocation import Layers, SizeAllocation


@dataclass(kw_only=True)
class Uniform(SizeAllocation):
    """s_l = s."""

    def allocate(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """See SizeAllocation."""
        return dict.fromkeys(layers.shapes, sparsity)
