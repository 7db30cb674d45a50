"""Structured pruning of one block: from scores of weights to masks over coupled units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reprune.errors import RunError
from reprune.model.coupling import Coupling, find_couplings
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import LayerContext, Pruned, ScorePruner, UnitPruner, require_finite
from reprune.sparsity.coupled_units import CoupledUnits

Projected = Callable[[Sequence[Coupling]], Mapping[str, Tensor]]
"""By consumer the means over tokens of ‖W_u x_u‖₁ of its units u, float32 [units]."""


def prune_units(
    model: LoadedModel,
    pruner: ScorePruner | UnitPruner,
    pattern: CoupledUnits,
    layers: Mapping[str, LayerContext],
    shares: Mapping[str, float],
    projected: Projected,
) -> dict[str, Pruned]:
    """The layers of a block, by name within it, with whole units removed.

    Of each submodule as many units go as the mean of its layers' `shares`, weighted by their sizes, says. RunError for
    layers that belong to no unit, and for units of which some layers are not to be pruned. `projected` gives what a
    UnitPruner reads, and is not called for others.
    """
    block = next(iter(layers.values())).block
    couplings = couplings_of(model, block, list(layers))
    put_out = projected(couplings) if isinstance(pruner, UnitPruner) else {}
    found: dict[str, Pruned] = {}
    for coupling in couplings:
        names = [coupling.consumer, *coupling.rows]
        consumer = layers[coupling.consumer]
        if isinstance(pruner, UnitPruner):
            units = pruner.unit_scores(consumer, coupling.columns, put_out[coupling.consumer])
            require_finite(units, consumer)
        else:
            scores = {name: pruner.score(layers[name]).float() for name in names}
            for name in names:
                require_finite(scores[name], layers[name])
            units = pattern.unit_scores(scores, coupling.consumer, coupling.columns, coupling.rows)
        units = units.masked_fill(_gone(coupling, consumer), -torch.inf)
        sizes = {name: layers[name].weight.numel() for name in names}
        share = sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
        kept = pattern.keep_units(units, share)
        removed = ~kept
        for name in names:
            keep = torch.ones_like(layers[name].weight, dtype=torch.bool)
            if name == coupling.consumer:
                keep[:, coupling.columns[removed].reshape(-1)] = False
            else:
                keep[coupling.rows[name][removed].reshape(-1)] = False
            facts = {"units": len(kept), "removed_units": int(removed.sum())}
            found[name] = Pruned(torch.where(keep, layers[name].weight, 0), keep, (), facts)
    return found


def couplings_of(model: LoadedModel, block: int, names: Sequence[str]) -> list[Coupling]:
    """The coupled units of the layers `names` of a block, on the device. RunError where they are not whole units."""
    wanted = set(names)
    found = []
    for coupling in find_couplings(model, block):
        members = {coupling.consumer, *coupling.rows}
        if members & wanted:
            missing = sorted(members - wanted)
            if missing:
                raise RunError(
                    f"block {block}: {coupling.submodule} goes as a whole with pattern=structured, and {missing[0]} is "
                    "not to be pruned; use targets=all, attention or mlp"
                )
            device = model.plan.device
            rows = {name: places.to(device) for name, places in coupling.rows.items()}
            found.append(replace(coupling, columns=coupling.columns.to(device), rows=rows))
    alone = sorted(wanted - {name for it in found for name in (it.consumer, *it.rows)})
    if alone:
        raise RunError(
            f"block {block}: {alone[0]} belongs to no unit that can go as a whole; leave it out with targets=…"
        )
    return found


def _gone(coupling: Coupling, consumer: LayerContext) -> Tensor:
    """The units that earlier rounds removed, bool [units]."""
    if consumer.removed is None:
        return torch.zeros(len(coupling.columns), dtype=torch.bool, device=consumer.weight.device)
    return consumer.removed.all(dim=0)[coupling.columns].all(dim=1)
