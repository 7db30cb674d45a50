"""Pruner `none`: the dense model, as a row of comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from reprune.pruning.contract import LayerContext, LayerShape, Needs, Pruned
from reprune.sparsity.patterns import Pattern


@dataclass(kw_only=True)
class KeepAll:
    """M = 1, whatever the sparsity."""

    needs: ClassVar[Needs] = Needs(prunes=False)

    def check(self, pattern: Pattern) -> None:
        """No pattern is made."""

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """None: nothing is removed."""
        return None

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        return Pruned(layer.weight.clone(), torch.ones_like(layer.weight, dtype=torch.bool))
