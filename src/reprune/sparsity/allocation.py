"""The contract of allocations: how the sparsity is spread over layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Allocation(Protocol):
    """From a model's layers to a sparsity for each."""

    def allocate(self, num_weights: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """Sparsity by layer; the mean weighted by `num_weights` is `sparsity`, up to rounding."""
        ...
