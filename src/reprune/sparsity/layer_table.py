"""Allocation `layers`: a table of the user's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from reprune.errors import ConfigError, did_you_mean
from reprune.sparsity.allocation import Layers, SizeAllocation, Wanted

KEY = "allocation.table"


@dataclass(kw_only=True)
class LayerTable(SizeAllocation):
    """s_l of the first pattern in `table` that matches the layer's name, '0.self_attn.q_proj'; * and ? are wildcards.

    Layers that no pattern matches share what is left of the budget alike. Without a table that is all of it. The table
    holds in every round of a schedule, so that one whose first rounds are below it cannot be met.
    """

    table: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for pattern, share in (self.table or {}).items():
            if not 0 <= share < 1:
                raise ConfigError(
                    f"table.{pattern}", "outside its range", value=share, accepted="0 ≤ sparsity < 1"
                )

    def check(self, wanted: Wanted) -> None:
        """ConfigError for a pattern that matches no layer."""
        for pattern in self.table or {}:
            if not any(fnmatchcase(name, pattern) for name in wanted.layers.shapes):
                kinds = list(dict.fromkeys(re.sub(r"^\d+\.", "*.", name) for name in wanted.layers.shapes))
                raise ConfigError(
                    KEY,
                    "no layer that is pruned has such a name",
                    value=pattern,
                    accepted=kinds,
                    hint=did_you_mean(pattern, [*kinds, *wanted.layers.shapes]),
                )

    def allocate(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """See SizeAllocation. ConfigError where the table leaves no room for the budget."""
        weights = layers.num_weights
        given = {name: share for name in weights if (share := self._share(name)) is not None}
        taken = sum(share * weights[name] for name, share in given.items())
        free = sum(count for name, count in weights.items() if name not in given)
        left = sparsity * sum(weights.values()) - taken
        # Room for the rounding of a sum, no more.
        slack = 1e-9 * sum(weights.values())
        if not -slack <= left <= free + slack or (free and left >= free):
            least, most = taken / sum(weights.values()), (taken + free) / sum(weights.values())
            raise ConfigError(
                KEY,
                f"the sparsity {sparsity:g} cannot be met with it: the layers that it names take {least:.1%} of all "
                f"weights, {'the others at most ' + f'{most - least:.1%}' if free else 'and there are no others'}",
                value=self.table,
                accepted=f"sparsity from {least:.6g} to below {most:.6g}" if free else f"sparsity={least!r}",
                hint="change the table or the sparsity; a table goes with schedule=one_shot",
            )
        rest = max(0.0, left) / free if free else 0.0
        return {name: given.get(name, rest) for name in weights}

    def _share(self, name: str) -> float | None:
        matching = (share for pattern, share in (self.table or {}).items() if fnmatchcase(name, pattern))
        return next(matching, None)
