"""Schedule `one_shot`: all of the sparsity in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reprune.sparsity.schedule import Masks, ReconstructAt


@dataclass(kw_only=True)
class OneShot:
    """A single step."""

    reconstruct: ClassVar[ReconstructAt] = "end"
    masks: ClassVar[Masks] = "monotone"

    def steps(self, sparsity: float) -> Sequence[float]:
        """See Schedule."""
        return [sparsity]
