"""Allocation `uniform`: the same sparsity for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(kw_only=True)
class Uniform:
    """s_l = s."""

    def allocate(self, num_weights: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """See Allocation."""
        return dict.fromkeys(num_weights, sparsity)
