"""Source `mixture`: several sources side by side, e.g. 256 web and 256 self-generated windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reprune.calibration.same import Same
from reprune.calibration.source import Bos, Part, TextSource
from reprune.errors import ConfigError, require_nonnegative, require_positive


@dataclass(kw_only=True)
class Mixture:
    """`parts` are sources, each with its own count; or `num_sequences` is shared out by `weights`.

    A part that is null is left out. `length`, `bos`, `split` and `set` hold for every part when they are set.
    """

    parts: Mapping[str, Any]
    weights: Mapping[str, float] | None = None
    num_sequences: int | None = None
    length: int | None = None
    bos: Bos | None = None
    split: Part | None = None
    set: int | None = None

    def __post_init__(self) -> None:
        require_positive(num_sequences=self.num_sequences, length=self.length)
        self.parts = {name: part for name, part in self.parts.items() if part is not None}
        if not self.parts:
            raise ConfigError("parts", "a mixture needs at least one part")
        nested = [
            name
            for name, part in self.parts.items()
            if not isinstance(part, TextSource) or isinstance(part, Same)
        ]
        if nested:
            raise ConfigError(f"parts.{nested[0]}", "a mixture's part must be a source of its own")
        if (self.weights is None) != (self.num_sequences is None):
            raise ConfigError(
                "num_sequences",
                "num_sequences and weights go together",
                value=f"num_sequences={self.num_sequences}, weights={self.weights}",
                hint="set both, or neither and a num_sequences for each part",
            )
        if self.weights is not None:
            require_nonnegative(**{f"weights.{name}": weight for name, weight in self.weights.items()})
            if set(self.weights) != set(self.parts) or sum(self.weights.values()) <= 0:
                raise ConfigError(
                    "weights",
                    "one weight for each part, not all zero",
                    value=dict(self.weights),
                    accepted=self.parts,
                )

    def resolve(self) -> dict[str, TextSource]:
        """The parts with their counts and the fields set here."""
        counts = self._counts()
        shared = {"length": self.length, "bos": self.bos, "split": self.split, "set": self.set}
        shared = {name: value for name, value in shared.items() if value is not None}
        return {
            name: replace(part, num_sequences=counts[name], **shared)
            for name, part in self.parts.items()
            if counts[name] != 0
        }

    def _counts(self) -> dict[str, int | None]:
        if self.weights is None or self.num_sequences is None:
            return {name: part.num_sequences for name, part in self.parts.items()}
        total = sum(self.weights.values())
        exact = {name: self.num_sequences * self.weights[name] / total for name in self.parts}
        counts = {name: int(share) for name, share in exact.items()}
        # Largest remainders take what rounding down left over; ties go by the order of the parts.
        short = self.num_sequences - sum(counts.values())
        for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:short]:
            counts[name] += 1
        return dict(counts)
