"""One view on every kind of linear layer: weight as [d_out, d_in], whatever the module stores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from reprune.errors import ConfigError


@dataclass(frozen=True)
class LinearView:
    """A prunable linear layer of a block.

    `name` is its path within the block; `parameter` the name of its weight there.
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def parameter(self) -> str:
        """Path of the weight within the block."""
        return f"{self.name}.weight"

    @property
    def stored(self) -> Tensor:
        """The weight as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight as [d_out, d_in], detached; shares memory with the module."""
        return self.orient(self.stored.detach())

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    def orient(self, stored_or_view: Tensor) -> Tensor:
        """Turn a tensor between the stored layout and [d_out, d_in]; its own inverse."""
        return stored_or_view.T if self.transposed else stored_or_view

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Put a [d_out, d_in] weight into the module, in the module's dtype."""
        self.stored.copy_(self.orient(weight))


def linears_of(block: nn.Module) -> dict[str, LinearView]:
    """The prunable linears of a block, in module order.

    Raises ConfigError for experts fused into one parameter: to leave them out in silence would be another sparsity.
    """
    found = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            found[name] = LinearView(name, module, transposed=isinstance(module, Conv1D))
        fused = [own for own, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
        if fused and not isinstance(module, _ConvNd):
            raise ConfigError(
                "model",
                "its experts are fused into one parameter, which cannot be pruned yet",
                value=f"{name}.{fused[0]}",
            )
    return found
