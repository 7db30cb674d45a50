"""What is fitted to a layer right after it was pruned, in closed form or near it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from reprune.engine.statistics import InputStatistics
from reprune.reconstruction.pairs import PairStatistics


@dataclass(frozen=True)
class Solved:
    """New weights [d_out, d_in], float32, zero where nothing is kept; what is added to the bias [d_out], None: nothing.

    `told` goes into the layer's row of the record.
    """

    weight: Tensor
    bias_change: Tensor | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


class Layerwise(ABC):
    """Fits one layer at a time. `name` is that of its entry in the record."""

    name: ClassVar[str]
    reads_gram: ClassVar[bool]
    """Whether it reads Σ x xᵀ of the layer's inputs, or only their means."""
    writes_bias: ClassVar[bool]
    """Whether it changes biases, so that every layer has to have one."""
    paired: ClassVar[bool]
    """Whether the dense chain can be its target, for which it gets PairStatistics."""

    @property
    def products(self) -> int:
        """How many products of a layer's weight with its Gram a fit takes, for the guess of a run's time."""
        return 0

    @abstractmethod
    def solve(
        self,
        dense: Tensor,
        pruned: Tensor,
        keep: Tensor,
        statistics: InputStatistics,
        pairs: PairStatistics | None,
        place: str,
    ) -> Solved:
        """Fit a layer with the weights `dense`, pruned to `pruned` with the mask `keep`, all [d_out, d_in].

        `statistics` are of its inputs in the pruned chain, `pairs` of these with the dense chain's where that is the
        target. RunError, naming `place`, where there is no solution.
        """
