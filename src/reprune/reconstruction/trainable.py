"""Which parameters of a module reconstruction may change; masked weights never do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from reprune.model.linears import LinearView

Parameters = dict[str, nn.Parameter]

PIECE = 2**18
"""Weights that are masked at once."""


def everything(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """Linears, norms and biases: what BR, GP and CR update."""
    return dict(block.named_parameters())


def only_linears(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """The weights of the prunable linears."""
    weights = {view.parameter for view in linears.values()}
    return {name: parameter for name, parameter in block.named_parameters() if name in weights}


def biases_and_norms(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """Everything with one dimension, and the biases of fused experts."""
    weights = {view.parameter for view in linears.values()}
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.dim() == 1 or (name not in weights and name.endswith("bias"))
    }


def nothing(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """What the pruner left stays, whatever the other fields say."""
    return {}


TRAINABLE: dict[str, Callable[[nn.Module, Mapping[str, LinearView]], Parameters]] = {
    "all": everything,
    "linears": only_linears,
    "bias_norm": biases_and_norms,
    "masked_lora": only_linears,
    "none": nothing,
}


@dataclass(frozen=True)
class TrainedBlock:
    """A block in training: its own parameters that may change, by path, and 0/1 masks of those that are pruned.

    A mask is uint8, shaped like the parameter; a parameter without one may change everywhere.
    """

    number: int
    parameters: Parameters
    masks: Mapping[str, Tensor]


def choose(
    number: int,
    block: nn.Module,
    linears: Mapping[str, LinearView],
    keep: Mapping[str, Tensor],
    trainable: str,
    only_below: Sequence[str] | None,
) -> TrainedBlock:
    """The trainable parameters of a block, all of them or only those of the modules in `only_below`, and their masks."""
    chosen = {
        name: parameter
        for name, parameter in TRAINABLE[trainable](block, linears).items()
        if only_below is None or any(name.startswith(f"{path}.") for path in only_below)
    }
    masks: dict[str, Tensor] = {}
    for layer, kept in keep.items():
        view = linears[layer]
        if view.parameter in chosen:
            whole = masks.setdefault(view.parameter, torch.ones_like(chosen[view.parameter].detach(), dtype=torch.uint8))  # fmt: skip
            view.of(whole).copy_(kept)
    return TrainedBlock(number, chosen, masks)


@torch.no_grad()
def mask_(tensor: Tensor, mask: Tensor) -> None:
    """Multiply by a mask in place.

    In pieces, since the host converts a factor of another dtype as a whole first. It takes uint8 as fast as float32 so,
    in a quarter of the room; bool would cost it five times as much.
    """
    if tensor.is_cuda or not (tensor.is_contiguous() and mask.is_contiguous()):
        tensor.mul_(mask)
        return
    pieces = (torch.split(whole.view(-1), PIECE) for whole in (tensor, mask))
    for part, kept in zip(*pieces, strict=True):
        part.mul_(kept)


class Training(Protocol):
    """What the optimiser changes, and what that makes of the blocks' weights."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes."""
        ...

    def weights(self, block: int) -> dict[str, Tensor]:
        """Tensors that stand in for the block's own in the forward pass."""
        ...

    def mask_gradients(self) -> None:
        """Remove the gradient of what is pruned, for the sake of its norm."""
        ...

    def hold(self) -> None:
        """After an optimiser step: what is pruned is zero."""
        ...

    def distance(self) -> Tensor:
        """‖θ − θ₀‖²."""
        ...

    def finish(self) -> None:
        """Put the trained weights into the blocks."""
        ...


@dataclass
class Direct:
    """The blocks' own parameters, trained in place."""

    blocks: Sequence[TrainedBlock]
    _start: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """See Training."""
        return [parameter for block in self.blocks for parameter in block.parameters.values()]

    def _masked(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        for block in self.blocks:
            for name, mask in block.masks.items():
                yield block.parameters[name], mask

    def weights(self, block: int) -> dict[str, Tensor]:
        """See Training: the blocks hold them themselves."""
        return {}

    def mask_gradients(self) -> None:
        """See Training."""
        for parameter, mask in self._masked():
            if parameter.grad is not None:
                mask_(parameter.grad, mask)

    @torch.no_grad()
    def hold(self) -> None:
        """See Training."""
        for parameter, mask in self._masked():
            mask_(parameter, mask)

    def distance(self) -> Tensor:
        """See Training; θ₀ is what the parameters were at the first call."""
        if not self._start:
            self._start = [parameter.detach().clone() for parameter in self.parameters]
        pairs = zip(self.parameters, self._start, strict=True)
        return torch.stack([(parameter - start).square().sum() for parameter, start in pairs]).sum()

    def finish(self) -> None:
        """See Training: they are there."""
