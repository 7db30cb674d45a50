"""Allocation `global`: one ranking over all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reprune.errors import ConfigError, RunError
from reprune.identity import canonical
from reprune.pruning.contract import LayerContext, Pruner, ScorePruner, require_finite
from reprune.sparsity.allocation import ModelAllocation, ModelView, Wanted
from reprune.sparsity.balance import met

EXACT = 2**22
"""Up to so many weights every distinct score is counted by itself: some 50 MB."""

COARSE_BITS = 13
"""Beyond, so many of the lowest bits of a float32 are left out: scores within 0.1 % of each other are one."""


@dataclass(kw_only=True)
class Global(ModelAllocation):
    """The k lowest scores of the whole model go, k by the budget: s_l is layer l's share of them in its weights.

    `score`, a pruner that scores, ranks; null is the run's own. Within each layer the run's pruner then removes that
    share by its own rule (by row, for instance), so that only the counts are global. No layer loses more than
    `at_most`; what it is spared the others lose, by the same ranking. Equal scores are shared in proportion.
    """

    score: ScorePruner | None = None
    at_most: float = 0.95

    def __post_init__(self) -> None:
        if self.score is not None and not isinstance(self.score, ScorePruner):
            raise ConfigError(
                "score", "this pruner has no score to rank by", value=type(self.score).__name__,
                accepted="a pruner that scores, such as reprune.pruning.magnitude.Magnitude",
            )  # fmt: skip
        if not 0 < self.at_most < 1:
            raise ConfigError("at_most", "outside its range", value=self.at_most, accepted="0 < at_most < 1")

    def identity(self) -> dict[str, Any]:
        """The fields, with the class of the score."""
        return {"score": None if self.score is None else canonical(self.score), "at_most": self.at_most}

    def check(self, wanted: Wanted) -> None:
        """ConfigError for a pruner without a score, a score that needs gradients, and a cap below the sparsity."""
        score = self._score(wanted.pruner)
        if score.needs.block_gradients or (score.needs.gradients and self.score is not None):
            raise ConfigError(
                "allocation.score",
                "gradients of blocks, or of the whole model for another score than the run's, are not taken before the "
                "sparsities are known",
                value=type(score).__name__,
                accepted="a score of weights, activations or the run's own gradients",
                hint="allocation=global_magnitude",
            )
        if max(wanted.sparsities) > self.at_most:
            raise ConfigError(
                "allocation.at_most", "no layer may lose as much as all of them have to lose in the mean",
                value=self.at_most, accepted=f"at least the sparsity, {max(wanted.sparsities):g}",
            )  # fmt: skip

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        score = self._score(view.pruner)
        num_weights = view.layers.num_weights
        left_out = 0 if sum(num_weights.values()) <= EXACT else COARSE_BITS
        needs = score.needs
        blocks = view.visit(
            norm=needs.norm, gram=needs.gram, text=needs.any, without=needs.statistics_without
        )
        counts = {
            name: _Counts.of(score, layer, left_out)
            for block in blocks
            for name, layer in block.layers.items()
        }
        return [self._shares(counts, num_weights, sparsity) for sparsity in sparsities]

    def _score(self, pruner: Pruner) -> ScorePruner:
        score = pruner if self.score is None else self.score
        if not isinstance(score, ScorePruner):
            raise ConfigError(
                "allocation.score", "the pruner has no score to rank by", value=type(score).__name__,
                accepted="a pruner that scores, or a score of the allocation's own",
                hint="allocation=global_magnitude",
            )  # fmt: skip
        return score

    def _shares(
        self, counts: Mapping[str, _Counts], num_weights: Mapping[str, int], sparsity: float
    ) -> dict[str, float]:
        def removed(below: int) -> float:
            caps = {name: self.at_most * num for name, num in num_weights.items()}
            return sum(min(caps[name], own.below(below)) for name, own in counts.items())

        # The highest threshold that does not remove too much, by bisection; all scores are below the upper end.
        threshold, beyond = 0, 2**31
        while beyond - threshold > 1:
            middle = (threshold + beyond) // 2
            if removed(middle) <= sparsity * sum(num_weights.values()):
                threshold = middle
            else:
                beyond = middle
        edges = {name: (own.below(threshold), own.below(threshold + 1)) for name, own in counts.items()}

        def shares(part: float) -> dict[str, float]:
            return {
                name: (low + part * (high - low)) / num_weights[name] for name, (low, high) in edges.items()
            }

        return met(shares, 0.0, 1.0, num_weights, sparsity, self.at_most)


@dataclass(frozen=True)
class _Counts:
    """A layer's scores as whole numbers that sort as they do, each once, ascending; how many lie up to each."""

    values: np.ndarray[Any, np.dtype[np.int32]]
    up_to: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, score: ScorePruner, layer: LayerContext, left_out: int) -> _Counts:
        """The bits of a float32 that is not negative, read as an integer, without its `left_out` lowest."""
        scores = score.score(layer).float()
        require_finite(scores, layer)
        if bool((scores < 0).any()):
            raise RunError(
                f"block {layer.block}, layer {layer.name}: {type(score).__name__} gives negative scores, which are not "
                "ranked over layers; use another allocation.score"
            )
        # abs: the bits of -0 are those of a negative number.
        bits = scores.abs().contiguous().view(torch.int32) >> left_out
        values, counts = torch.unique(bits, return_counts=True)
        return cls(values.cpu().numpy(), counts.cumsum(dim=0).cpu().numpy())

    def below(self, bound: int) -> int:
        """How many scores are below `bound`."""
        place = int(np.searchsorted(self.values, bound))
        return int(self.up_to[place - 1]) if place else 0
