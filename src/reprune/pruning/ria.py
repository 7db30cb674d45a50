"""Pruner `ria` (Zhang et al., 2024, "Plug-and-Play", ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reprune.errors import ConfigError, require_nonnegative
from reprune.pruning.channel_permutation import assign_channels, spread_channels
from reprune.pruning.contract import LayerContext, Needs, Pruned, ScorePruner, rank_first, require_finite
from reprune.sparsity.patterns import Group, Pattern


@dataclass(kw_only=True)
class RIA(ScorePruner):
    """S_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^a, relative importance and activation.

    A weight counts by its share of its input channel and of its output, so that no channel is lost as a whole.
    `activation_power` is a (0.5). Compared within the matrix (`matrix`, as the paper's code does) or the output `row`.

    `permute`: for N:M the input channels are first brought into another order, in which those with high scores share a
    group as little as possible. `heuristic` (or true) is the paper's heuristic allocation alone, by the scores' sums over
    outputs; `assignment` goes on from there with its linear sum assignment, which keeps more of the scores and takes
    d_out · d_in² / group operations. The mask then has N:M in that order of channels, not in the model's own, so that
    hardware needs them permuted too. Nothing is stored but the mask.

    The paper has no arXiv number: OpenReview Tr0lPx9woF.
    """

    activation_power: float = 0.5
    compare: Literal["matrix", "row"] = "matrix"
    permute: bool | Literal["heuristic", "assignment"] = False

    needs: ClassVar[Needs] = Needs(norm=True)

    def __post_init__(self) -> None:
        require_nonnegative(activation_power=self.activation_power)
        self.within = Group(self.compare)  # type: ignore[misc]
        # One choice has one spelling in a run's hash: the one it had before there was another choice.
        if self.permute == "heuristic":
            self.permute = True

    @property
    def reorders(self) -> bool:
        """Where channels are permuted."""
        return self.permute is not False

    def check(self, pattern: Pattern) -> None:
        """ConfigError for an order of channels where none share a group."""
        if self.reorders and pattern.columns is None:
            raise ConfigError(
                "pruner.permute", "channels are permuted for the groups of N:M, and this pattern has none",
                value=self.permute, accepted="false, or an N:M pattern", hint="pattern=2to4, or pruner.permute=false",
            )  # fmt: skip

    def score(self, layer: LayerContext) -> Tensor:
        """See ScorePruner."""
        size = layer.weight.float().abs()
        # A row or column of zeros has no share of anything, and 0 / 0 would be NaN.
        by_input = size / size.sum(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        by_output = size / size.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (by_input + by_output) * layer.inputs.norm.pow(self.activation_power)

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        if self.permute is False:
            return super().prune(layer, pattern, sparsity)
        assert pattern.columns is not None, "`check` refuses others"
        scores = self.score(layer)
        require_finite(scores, layer)
        order = spread_channels(scores.sum(dim=0), pattern.columns)
        if self.permute == "assignment":
            one_group = torch.arange(pattern.columns, dtype=scores.dtype)[None]
            kept = int(pattern.keep(one_group, sparsity, self.within).sum())
            order = assign_channels(scores, order, pattern.columns, kept)
        ranked = rank_first(scores, layer.removed)
        keep = torch.empty_like(scores, dtype=torch.bool)
        keep[:, order] = pattern.keep(ranked[:, order].contiguous(), sparsity, self.within)
        return Pruned(torch.where(keep, layer.weight, 0), keep)
