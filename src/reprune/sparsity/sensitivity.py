"""Allocation `sensitivity`: what each layer's pruning costs, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from reprune.errors import ConfigError
from reprune.sparsity.allocation import ModelAllocation, ModelView, Wanted
from reprune.sparsity.patterns import Pattern, count_removed

Point = tuple[float, float]


@dataclass(kw_only=True)
class Sensitivity(ModelAllocation):
    """min Σ_l e_l(s_l) over sparsities with the budget's mean, e_l as measured with layer l alone pruned.

    e_l is the relative error of its block's output on the validation text, per token, with the run's pruner and pattern
    at each sparsity of `grid`, the statistics and the block's input being the dense model's. Between the measured points,
    of which (0, 0) is one, it is taken to be their lower convex hull, so that going on where a weight costs least is
    the optimum. Errors of layers are taken to add up, those of all blocks to count alike, and a `refine` is left out.
    N:M takes the grid's nearest whole counts of a group. Costs grid × layers prunings and passes of the validation text
    through a block. No layer loses more than the end of the grid.
    """

    grid: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7, 0.9])

    def __post_init__(self) -> None:
        if not self.grid or not all(0 < share < 1 for share in self.grid):
            raise ConfigError(
                "grid", "sparsities to measure at", value=self.grid, accepted="one or more, each in (0, 1)"
            )

    def check(self, wanted: Wanted) -> None:
        """ConfigError without a validation text, for a pruner that needs gradients, units, and a grid that ends below the sparsity."""
        pruner = wanted.pruner
        if wanted.pattern.units:
            raise ConfigError(
                "allocation", "it prunes one layer at a time, and units of several layers go as a whole",
                value="sensitivity", accepted="another allocation with this pattern", hint="allocation=owl",
            )  # fmt: skip
        if not wanted.validation:
            raise ConfigError(
                "allocation",
                "it measures what pruning a layer costs on validation text, and there is none",
                value="sensitivity",
                accepted="one or more validation texts",
                hint="+calibration@validation.choice=web",
            )
        if pruner.needs.block_gradients:
            raise ConfigError(
                "allocation",
                f"{type(pruner).__name__} needs gradients of blocks, which are not taken before the sparsities are known",
                value="sensitivity",
                accepted="a pruner that reads weights, activations or the whole model's gradients",
                hint="pruner=wanda or sparsegpt, or another allocation",
            )
        grid = self._grid(wanted.pattern)
        if max(wanted.sparsities) > max(grid, default=0.0):
            raise ConfigError(
                "allocation.grid", "its end is the most that any layer may lose, below what all have to lose",
                value=grid, accepted=f"an end at or above the sparsity, {max(wanted.sparsities):g}",
            )  # fmt: skip

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        grid = self._grid(view.pattern)
        curves = dict[str, list[Point]]()
        needs = view.pruner.needs
        for block in view.visit(norm=needs.norm, gram=needs.gram, without=needs.statistics_without):
            for name, layer in block.layers.items():
                points = [(0.0, 0.0)]
                for share in grid:
                    pruned = view.pruner.prune(layer, view.pattern, share)
                    points.append((share, block.error({name: pruned.weight})))
                curves[name] = points
        return [filled(curves, view.layers.num_weights, sparsity) for sparsity in sparsities]

    def _grid(self, pattern: Pattern) -> list[float]:
        group = pattern.columns
        if group is None:
            return sorted(set(self.grid))
        # As a group cannot be emptied, the last count is one short of it.
        counts = {min(max(1, count_removed(group, share)), group - 1) for share in self.grid}
        return [count / group for count in sorted(counts) if count]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the lower convex hull of points with ascending abscissae."""
    hull: list[Point] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def filled(
    curves: Mapping[str, Sequence[Point]], num_weights: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Sparsities whose weighted mean is `sparsity` and whose errors, by the hulls of `curves`, have the least sum.

    A hull's segments rise in slope, so taking the cheapest of all layers first takes each layer's in their order.
    """
    segments = [
        ((y1 - y0) / ((x1 - x0) * num_weights[name]), name, x1 - x0)
        for name, points in curves.items()
        for (x0, y0), (x1, y1) in pairwise(lower_hull(points))
    ]
    found = dict.fromkeys(curves, 0.0)
    left = sparsity * sum(num_weights.values())
    for _, name, width in sorted(segments, key=lambda segment: segment[0]):
        taken = min(width, left / num_weights[name])
        found[name] += taken
        left = max(0.0, left - taken * num_weights[name])
    return found
