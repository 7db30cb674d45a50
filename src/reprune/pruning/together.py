"""Prune layers in turn: those that share an input at once, where a pruner gains by it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from reprune.pruning.contract import LayerContext, Pruned, Pruner
from reprune.sparsity.patterns import Pattern


@runtime_checkable
class JointPruner(Protocol):
    """A Pruner that is faster with layers that share an input than with one after the other."""

    def prune_together(
        self, layers: Sequence[LayerContext], pattern: Pattern, sparsities: Sequence[float]
    ) -> list[Pruned]:
        """What `prune` makes of each of `layers`, which share their statistics, to its own sparsity."""
        ...


def pruned_in_turn(
    pruner: Pruner, layers: Mapping[str, LayerContext], pattern: Pattern, shares: Mapping[str, float]
) -> Iterator[tuple[str, Pruned, float]]:
    """By name each layer pruned to its share, and the seconds that took."""
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        joint = isinstance(pruner, JointPruner) and layer.statistics is not None
        groups.setdefault(id(layer.statistics) if joint else name, []).append(name)
    for names in groups.values():
        start = time.perf_counter()
        if len(names) > 1:
            assert isinstance(pruner, JointPruner)
            found = pruner.prune_together(
                [layers[name] for name in names], pattern, [shares[name] for name in names]
            )
        else:
            found = [pruner.prune(layers[name], pattern, shares[name]) for name in names]
        seconds = (time.perf_counter() - start) / len(names)
        for name, pruned in zip(names, found, strict=True):
            yield name, pruned, seconds
