"""Allocation `global_units`: one ranking of the coupled units of all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.errors import ConfigError, RunError
from reprune.model.coupling import Coupling
from reprune.pruning.contract import LayerContext, ScorePruner, require_finite
from reprune.sparsity.allocation import DenseBlock, ModelAllocation, ModelView, Wanted
from reprune.sparsity.coupled_units import CoupledUnits


@dataclass(kw_only=True)
class GlobalUnits(ModelAllocation):
    """Units of all submodules in one ranking; the lowest go until their weights are the budget.

    An et al., 2023, FLAP, arXiv 2312.11983, section 3.2 (AL-AM): the scores of the features of each submodule are
    standardised, f̂ = (f − mean f) / std f, and a unit's is the mean of its features' (a head has many, a channel one).
    f_j is the sum of the scores of the consumer's column j, with `scores_of: all` also an even part of those of its
    unit's rows. A unit costs its weights in all of its layers; one that would exceed the budget by more than leaving it
    falls short is left, and the ranking ends there. One unit of each submodule always stays.

    In each submodule the run's pruner then removes that many units, on the statistics that the run has there.
    """

    def check(self, wanted: Wanted) -> None:
        """ConfigError for a pattern without units, a pruner without scores of weights, gradients of blocks."""
        if not isinstance(wanted.pattern, CoupledUnits):
            raise ConfigError(
                "allocation", "there are no units that could be ranked", value="global_units",
                accepted="another allocation with this pattern", hint="pattern=structured",
            )  # fmt: skip
        if not isinstance(wanted.pruner, ScorePruner) or wanted.pruner.needs.block_gradients:
            raise ConfigError(
                "allocation", "this pruner has no scores of weights that are known before blocks are pruned",
                value="global_units", accepted="uniform with this pruner", hint="pruner=flap or pruner=wanda",
            )  # fmt: skip

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        pruner, pattern = view.pruner, view.pattern
        assert isinstance(pruner, ScorePruner)
        assert isinstance(pattern, CoupledUnits)
        needs = pruner.needs
        ranked = [
            _Ranked.of(block, coupling, pruner, pattern)
            for block in view.visit(
                norm=needs.norm, gram=needs.gram, text=needs.any, without=needs.statistics_without
            )
            for coupling in block.couplings
        ]
        scores = torch.cat([one.scores for one in ranked])
        owner = torch.cat([torch.full((len(one.scores),), place) for place, one in enumerate(ranked)])
        order = scores.argsort(stable=True).tolist()
        total = sum(view.layers.num_weights.values())
        found = []
        for sparsity in sparsities:
            removed = _removed(ranked, [int(owner[unit]) for unit in order], sparsity * total)
            shares = {
                name: count / len(one.scores)
                for one, count in zip(ranked, removed, strict=True)
                for name in one.layers
            }
            found.append({name: shares[name] for name in view.layers.shapes})
        return found


@dataclass(frozen=True)
class _Ranked:
    """The units of one submodule: their scores, the weights of one of them, the layers they are of ('block.name')."""

    scores: Tensor
    cost: int
    layers: Sequence[str]

    @classmethod
    def of(cls, block: DenseBlock, coupling: Coupling, pruner: ScorePruner, pattern: CoupledUnits) -> _Ranked:
        names = [coupling.consumer, *coupling.rows]
        contexts = {name: block.layers[f"{block.index}.{name}"] for name in names}
        scores = {name: _scores(pruner, context) for name, context in contexts.items()}
        features = scores[coupling.consumer].sum(dim=0)[coupling.columns]
        whole = pattern.unit_scores(scores, coupling.consumer, coupling.columns, coupling.rows)
        features = features + ((whole - features.sum(dim=1)) / features.shape[1])[:, None]
        spread = features.std()
        if not bool(torch.isfinite(features).all()):
            raise RunError(f"block {block.index}: the scores of {coupling.submodule} are not finite; try dtype=float32")  # fmt: skip
        standard = (features - features.mean()) / spread if spread > 0 else torch.zeros_like(features)
        return cls(
            standard.mean(dim=1).cpu(), _cost(coupling, contexts), [f"{block.index}.{name}" for name in names]
        )


def _scores(pruner: ScorePruner, layer: LayerContext) -> Tensor:
    scores = pruner.score(layer).float()
    require_finite(scores, layer)
    return scores


def _cost(coupling: Coupling, layers: Mapping[str, LayerContext]) -> int:
    consumer = coupling.columns.shape[1] * layers[coupling.consumer].weight.shape[0]
    return consumer + sum(
        places.shape[1] * layers[name].weight.shape[1] for name, places in coupling.rows.items()
    )


def _removed(ranked: Sequence[_Ranked], owners: Sequence[int], budget: float) -> list[int]:
    """How many units of each submodule go; `owners` are those of all units, the lowest score first."""
    removed, left = [0] * len(ranked), budget
    for owner in owners:
        one = ranked[owner]
        if removed[owner] == len(one.scores) - 1:
            continue
        if one.cost > 2 * left:
            break
        removed[owner] += 1
        left -= one.cost
    return removed
