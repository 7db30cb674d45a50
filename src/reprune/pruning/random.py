"""Pruner `random`: uniform scores from the run's own stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.pruning.contract import LayerContext, ScorePruner


@dataclass(kw_only=True)
class Random(ScorePruner):
    """S_ij ~ U(0, 1), compared within the matrix; one stream a layer, so the order of layers does not matter."""

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        return torch.rand(layer.weight.shape, generator=layer.generator).to(layer.weight.device)
