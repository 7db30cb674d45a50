"""Layer-wise fit `bias_compensation` (An et al., 2023, FLAP, arXiv 2312.11983, equation 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.engine.statistics import InputStatistics
from reprune.reconstruction.layerwise import Layerwise, Solved
from reprune.reconstruction.pairs import PairStatistics


@dataclass(kw_only=True)
class BiasCompensation(Layerwise):
    """b += (W − Ŵ) E[X]: what the pruned weights gave in the mean, the bias gives from now on.

    For whole input features that go, Ŵ = M⊙W, it is FLAP's W ((1 − m)⊙E[X]); it is the best bias in least squares for
    any Ŵ. `change_norm` in the record is ‖(W − Ŵ) E[X]‖₂.
    """

    name: ClassVar[str] = "bias_compensation"
    reads_gram: ClassVar[bool] = False
    writes_bias: ClassVar[bool] = True
    paired: ClassVar[bool] = False

    @torch.no_grad()
    def solve(
        self,
        dense: Tensor,
        pruned: Tensor,
        keep: Tensor,
        statistics: InputStatistics,
        pairs: PairStatistics | None,
        place: str,
    ) -> Solved:
        """See Layerwise: the pruner's weights, and a bias beside them."""
        assert pairs is None
        change = (dense.float() - pruned.float()) @ statistics.mean
        return Solved(pruned.float(), change, {"change_norm": float(change.norm())})
