"""Schedule `one_shot`: all of the sparsity in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Over how many steps, each with its statistics, the sparsity is reached."""

    def steps(self, sparsity: float) -> Sequence[float]:
        """Ascending sparsities; the last is `sparsity`."""
        ...


@dataclass(kw_only=True)
class OneShot:
    """A single step."""

    def steps(self, sparsity: float) -> Sequence[float]:
        """See Schedule."""
        return [sparsity]
