"""Allocation `alpha_pruning` (Lu et al., 2024, arXiv 2410.10912)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reprune.errors import ConfigError, RunError
from reprune.pruning.contract import LayerContext, require_finite
from reprune.sparsity.allocation import ModelAllocation, ModelView
from reprune.sparsity.balance import scaled


@dataclass(kw_only=True)
class AlphaPruning(ModelAllocation):
    """s_b ∝ 1 − ε + 2ε(α_b − min α)/(max α − min α), scaled to the budget: heavier tails (smaller α) are pruned less.

    α_b is the mean over the block's matrices of the Hill estimate 1 + k/Σ_(i≤k) ln(λ_(n−i+1)/λ_(n−k)) of the exponent of
    the tail of their spectra, λ = σ² ascending and k = n/2. Reads weights only. Numerically zero λ are left out of n.
    """

    epsilon: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ConfigError("epsilon", "outside its range", value=self.epsilon, accepted="0 ≤ epsilon < 1")

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        found = defaultdict[int, list[float]](list)
        for block in view.visit(text=False):
            for layer in block.layers.values():
                found[block.index].append(hill(layer))
        alphas = {block: sum(own) / len(own) for block, own in found.items()}
        least, most = min(alphas.values()), max(alphas.values())
        span = most - least if most > least else 1.0
        mapped = {
            block: 1 - self.epsilon + 2 * self.epsilon * (alpha - least) / span
            for block, alpha in alphas.items()
        }
        wished = view.layers.by_block(mapped)
        return [scaled(wished, view.layers.num_weights, sparsity) for sparsity in sparsities]


def hill(layer: LayerContext) -> float:
    """α of a layer's spectrum. RunError for a matrix whose spectrum has no tail to fit."""
    weight = layer.weight.float()
    require_finite(weight, layer)
    values = torch.linalg.svdvals(weight).double().square()
    # What float32 cannot tell from zero would make the logarithm of noise a part of the tail.
    noise = values[0] * (max(weight.shape) * torch.finfo(torch.float32).eps) ** 2
    logs = values[values > noise].log()
    k = len(logs) // 2
    spread = float((logs[:k] - logs[k]).sum()) if k else 0.0
    if not spread > 0:
        raise RunError(
            f"block {layer.block}, layer {layer.name}: {len(logs)} singular values other than zero, which do not fall off, "
            "so that no tail can be fitted to them; leave the layer out by targets, or use another allocation"
        )
    return 1 + k / spread
