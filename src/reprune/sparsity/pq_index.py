"""Allocation `pq_index`: how compressible each layer's weights are (SAP, Diao et al., 2023, arXiv 2302.05601)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reprune.errors import ConfigError, require_nonnegative, require_positive
from reprune.pruning.contract import LayerContext, require_finite
from reprune.sparsity.allocation import ModelAllocation, ModelView
from reprune.sparsity.balance import scaled


@dataclass(kw_only=True)
class PQIndex(ModelAllocation):
    """s_l ∝ 1 − r_l/d_l, r = d·(1 + η)^(−q/(q−p))·(1 − I)^(pq/(q−p)), I = 1 − d^(1/q−1/p)·‖w‖_p/‖w‖_q.

    I is the PQ index of a layer's d weights, r the method's lower bound on how many of them are to be kept. With the
    defaults s_l ∝ I_l. Deviation: the paper lets the rule set the rate, step by step with training in between; here it
    is read once, of the dense weights, and scaled to the budget, so that the paper's factor γ has no effect and its cap
    β is left out. A layer of zeros counts as wholly compressible.
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        require_positive(p=self.p)
        require_nonnegative(eta=self.eta)
        if not self.p < self.q:
            raise ConfigError("q", "must be greater than p", value=f"p={self.p:g}, q={self.q:g}")

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """See ModelAllocation."""
        wished = {
            name: self._removed(layer)
            for block in view.visit(text=False)
            for name, layer in block.layers.items()
        }
        return [scaled(wished, view.layers.num_weights, sparsity) for sparsity in sparsities]

    def _removed(self, layer: LayerContext) -> float:
        weight = layer.weight.float().abs()
        require_finite(weight, layer)
        largest = float(weight.max())
        if largest == 0:
            return 1.0
        # Divided by the largest, so that no power leaves float32: the index does not depend on the scale.
        one = weight / largest
        of_p, of_q = (float(one.pow(power).double().mean()) ** (1 / power) for power in (self.p, self.q))
        # 1 − I is the ratio of the two power means.
        kept = (of_p / of_q) ** (self.p * self.q / (self.q - self.p))
        return max(0.0, float(1 - kept * (1 + self.eta) ** (-self.q / (self.q - self.p))))
