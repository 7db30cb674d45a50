"""Prune the layers of one block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprune.calibration.source import TextSet
from reprune.engine.chains import Boundary, Chains
from reprune.engine.statistics import InputStatistics, collecting
from reprune.errors import RunError
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import LayerContext, Pruner
from reprune.seeding import generator
from reprune.sparsity.patterns import Pattern


@dataclass(frozen=True)
class PruningPlan:
    """What is pruned how: the method, the pattern, a sparsity for each layer ('block.name'), the seed of its streams."""

    pruner: Pruner
    pattern: Pattern
    sparsity: Mapping[str, float]
    seed: int


def collect(
    plan: PruningPlan, chains: Chains, block: int, inputs: Boundary, texts: Sequence[TextSet]
) -> dict[str, InputStatistics]:
    """Input statistics of the block's layers: dense weights on the pruned chain's input."""
    if not plan.pruner.needs.any:
        return {}
    model = chains.model
    with (
        model.plan.holding(model.blocks[block]),
        collecting(model.linears[block], plan.pruner.needs.gram) as found,
    ):
        chains.observe(block, inputs, texts)
    missed = [name for name in model.linears[block] if name not in found]
    if missed:
        raise RunError(
            f"block {block}, layer {missed[0]}: it was not called in the forward pass, so it has no statistics"
        )
    return found


@torch.no_grad()
def prune_block(
    plan: PruningPlan, model: LoadedModel, block: int, statistics: Mapping[str, InputStatistics]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Prune every linear of a block in place. Returns the keep masks in the stored layout, and rows for the record."""
    masks: dict[str, Tensor] = {}
    rows: dict[str, Any] = {}
    with model.plan.holding(model.blocks[block]):
        for name, view in model.linears[block].items():
            full = f"{block}.{name}"
            stream = generator(plan.seed, "prune", full)
            layer = LayerContext(name, block, view.weight, statistics.get(name), stream)
            start = time.perf_counter()
            pruned = plan.pruner.prune(layer, plan.pattern, plan.sparsity[full])
            model.plan.synchronise()
            view.write(pruned.weight)
            masks[name] = view.orient(pruned.keep).cpu().contiguous()
            rows[name] = {
                "planned": plan.sparsity[full],
                "measured": 1 - float(pruned.keep.double().mean()),
                "weights": pruned.keep.numel(),
                "removed": int((~pruned.keep).sum()),
                "notes": list(pruned.notes),
                "seconds": round(time.perf_counter() - start, 4),
            }
    return masks, rows
