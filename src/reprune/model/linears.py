"""One view on every kind of linear layer: weight as [d_out, d_in], whatever the module stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from reprune.errors import ConfigError
from reprune.model.experts import Mixture, fused_names, is_fused, mixtures_of, stacked


@dataclass(frozen=True)
class LinearView:
    """A prunable linear layer of a block, or one expert's part of a parameter that all experts are fused into.

    `name` is its path within the block (of an expert: the parameter's path and the expert's `index`), `parameter`
    the path of the whole parameter there, `module` what holds it. `mixture` is what an expert belongs to.

    Gate and up of a fused expert stay one matrix, as they are stored: where a method compares weights within the
    matrix, the weights of both are ranked together.
    """

    name: str
    module: nn.Module
    parameter: str
    transposed: bool = False
    index: int | None = None
    mixture: Mixture | None = None

    @property
    def is_expert(self) -> bool:
        """Whether a router decides which tokens come here, so that there may be none."""
        return self.mixture is not None

    @property
    def stage(self) -> str:
        """The same for layers that are computed at the same moment: one kind of layer of all experts."""
        if self.index is not None:
            return self.parameter
        if self.mixture is None:
            return self.name
        _, _, below = self.name.removeprefix(f"{self.mixture.path}.").partition(".")
        return f"{self.mixture.path}.*.{below}"

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor shaped like the whole parameter that belongs here; shares its memory."""
        return tensor if self.index is None else tensor[self.index]

    @property
    def stored(self) -> Tensor:
        """The weight as the module stores it, the expert's part alone; shares memory with the module."""
        weight = getattr(self.module, self.parameter.rpartition(".")[2])
        assert isinstance(weight, Tensor)
        return self.of(weight)

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

    @property
    def bias(self) -> str:
        """The path within the block of its bias [d_out], whether it has one or not."""
        assert self.index is None, "what experts are fused into has no bias of one layer's shape"
        return f"{self.parameter.rpartition('.')[0]}.bias".removeprefix(".")

    @torch.no_grad()
    def write_bias(self, bias: Tensor) -> None:
        """Put a bias [d_out] into the module, in the module's dtype."""
        assert isinstance(self.module.bias, Tensor)
        self.module.bias.copy_(bias)


def linears_of(block: nn.Module) -> dict[str, LinearView]:
    """The prunable linears of a block, in module order: one view for every expert of a fused parameter, no routers.

    Raises ConfigError, naming the parameter, for experts that no view reaches: to leave them out in silence would be
    another sparsity.
    """
    mixtures = mixtures_of(block)
    routers = {path for mixture in mixtures for path in mixture.routers}
    found: dict[str, LinearView] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            if not _below(path, routers):
                transposed = isinstance(module, Conv1D)
                around = [mixture for mixture in mixtures if _below(path, [mixture.path])]
                mixture = around[-1] if around else None
                found[path] = LinearView(path, module, f"{path}.weight", transposed, mixture=mixture)
        elif is_fused(module):
            (mixture,) = [mixture for mixture in mixtures if mixture.path == path]
            found |= {view.name: view for view in _fused_views(mixture, module)}
        _refuse_unreached(path, module)
    for parameter in stacked(block):
        raise _unreached(parameter)
    return found


def _below(path: str, above: Sequence[str] | set[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in above)


def _fused_views(mixture: Mixture, module: nn.Module) -> list[LinearView]:
    views = []
    for own in fused_names(module):
        parameter = f"{mixture.path}.{own}".removeprefix(".")
        for index in range(len(getattr(module, own))):
            name = f"{parameter}.{index}"
            views.append(LinearView(name, module, parameter, bool(module.is_transposed), index, mixture))
    return views


def _refuse_unreached(path: str, module: nn.Module) -> None:
    reached = fused_names(module) if is_fused(module) else ()
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and own not in reached and not isinstance(module, _ConvNd):
            raise _unreached(f"{path}.{own}")


def _unreached(parameter: str) -> ConfigError:
    return ConfigError(
        "model",
        "experts (or other matrices) are fused into one parameter in a way of its own, which cannot be pruned",
        value=parameter,
        accepted="nn.Linear, Conv1D, or experts that follow transformers' use_experts_implementation",
    )
