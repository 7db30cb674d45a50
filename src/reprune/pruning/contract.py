"""The contract of a pruning method. Most methods are a ScorePruner: a score, and where it is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from reprune.engine.statistics import InputStatistics
from reprune.errors import RunError
from reprune.sparsity.patterns import Group, Pattern


@dataclass(frozen=True)
class Needs:
    """Which statistics of a layer's input a method reads, and whether it removes anything at all."""

    norm: bool = False
    gram: bool = False
    prunes: bool = True

    @property
    def any(self) -> bool:
        """Whether any pass over the calibration text is needed."""
        return self.norm or self.gram


@dataclass(frozen=True)
class LayerContext:
    """A layer as a method sees it: weight [d_out, d_in] in the model's dtype, not to be changed in place."""

    name: str
    block: int
    weight: Tensor
    statistics: InputStatistics | None
    generator: torch.Generator

    @property
    def inputs(self) -> InputStatistics:
        """The statistics, for methods that asked for them."""
        assert self.statistics is not None, f"{self.name}: the method did not ask for statistics"
        return self.statistics


@dataclass(frozen=True)
class Pruned:
    """New weight (dtype as given, zero where not kept), keep mask bool [d_out, d_in], and remarks for the record."""

    weight: Tensor
    keep: Tensor
    notes: Sequence[str] = ()


class Pruner(Protocol):
    """One layer at a time: mask and weight."""

    needs: Needs

    def check(self, pattern: Pattern) -> None:
        """ConfigError for a pattern that the method cannot make, before anything is loaded."""
        ...

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """Prune a layer to `sparsity` in `pattern`. RunError, naming the layer, when it cannot be done."""
        ...


class ScorePruner(ABC):
    """Keeps the weights with the highest scores and leaves their values."""

    needs: ClassVar[Needs] = Needs()
    within: ClassVar[Group] = Group.MATRIX

    def check(self, pattern: Pattern) -> None:  # noqa: B027 (most methods have nothing to check)
        """Scores go with every pattern."""

    @abstractmethod
    def score(self, layer: LayerContext) -> Tensor:
        """Importance of every weight, float32 [d_out, d_in]; the lowest are removed."""

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        scores = self.score(layer)
        require_finite(scores, layer)
        keep = pattern.keep(scores, sparsity, self.within)
        return Pruned(torch.where(keep, layer.weight, 0), keep)


def require_finite(scores: Tensor, layer: LayerContext) -> None:
    """Raise RunError when a score is NaN or infinite: no mask can be chosen from it."""
    if not bool(torch.isfinite(scores).all()):
        raise RunError(
            f"block {layer.block}, layer {layer.name}: scores are not finite; the weights or the calibration "
            "activations overflow, try dtype=float32"
        )
