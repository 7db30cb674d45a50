"""Allocation `depth_ramp`: the sparsity grows from block to block."""

from __future__ import annotations

from dataclasses import dataclass

from reprune.errors import ConfigError
from reprune.sparsity.allocation import Layers, SizeAllocation
from reprune.sparsity.balance import shifted


@dataclass(kw_only=True)
class DepthRamp(SizeAllocation):
    """s_b = s + slope · (t_b − 1/2) in block b, where t_b goes from 0 in the first pruned block to 1 in the last.

    Clipped to [0, 1) and shifted by what keeps the budget; a negative slope prunes early blocks more.
    """

    slope: float = 0.2

    def __post_init__(self) -> None:
        if not -1 <= self.slope <= 1:
            raise ConfigError(
                "slope", "how much more of the last block goes than of the first", value=self.slope, accepted="-1 to 1"
            )  # fmt: skip

    def allocate(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """See SizeAllocation."""
        blocks = set(layers.blocks.values())
        first, span = min(blocks), max(1, max(blocks) - min(blocks))
        ramp = {block: self.slope * (block - first) / span for block in blocks}
        return shifted(layers.by_block(ramp), layers.num_weights, sparsity)
