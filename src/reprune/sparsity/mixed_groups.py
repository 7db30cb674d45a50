"""Pattern `mixed_of_8`: N:M with a count of its own for every block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

from reprune.errors import ConfigError
from reprune.sparsity.patterns import KeptOfGroup, Unstructured


@dataclass(kw_only=True)
class MixedOfGroup(KeptOfGroup):
    """Of every `group` consecutive inputs of an output as many stay as the allocation gives their block, `kept` in the mean."""

    @property
    def varies(self) -> bool:
        """Every block may have its own."""
        return True

    def resolve(self, sparsity: float | None) -> float:
        """1 − kept/group where none is given; must lie in [0, 1)."""
        return super().resolve(None) if sparsity is None else Unstructured().resolve(sparsity)

    def check_steps(self, steps: Sequence[float]) -> None:
        """One round only."""
        raise ConfigError(
            "schedule", "blocks with counts of their own are pruned in one round", value=f"{len(steps)} rounds",
            accepted="one_shot with this pattern", hint="schedule=one_shot",
        )  # fmt: skip

    def settle(self, shares: Mapping[str, float], num_weights: Mapping[str, int]) -> dict[str, float]:
        """Whole counts by block, the blocks that lose most by rounding down rounded up until the mean is met."""
        weights, wished = defaultdict[str, int](int), defaultdict[str, float](float)
        for name, share in shares.items():
            block = name.partition(".")[0]
            weights[block] += num_weights[name]
            wished[block] += share * num_weights[name] * self.group
        exact = {block: wished[block] / weights[block] for block in weights}
        counts = {block: min(floor(count), self.group - 1) for block, count in exact.items()}
        missing = sum((exact[block] - counts[block]) * weights[block] for block in weights)
        for block in sorted(weights, key=lambda block: counts[block] - exact[block]):
            # Rounded up where that brings the mean nearer to the one that was asked for.
            if counts[block] < self.group - 1 and weights[block] <= 2 * missing:
                counts[block] += 1
                missing -= weights[block]
        return {name: counts[name.partition(".")[0]] / self.group for name in shares}
