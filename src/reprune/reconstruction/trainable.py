"""Which parameters of a block reconstruction may change; masked weights never do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from reprune.model.linears import LinearView

Parameters = dict[str, nn.Parameter]


def everything(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """Linears, norms and biases: what BR, GP and CR update."""
    return dict(block.named_parameters())


def only_linears(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """The weights of the prunable linears."""
    weights = {view.parameter for view in linears.values()}
    return {name: parameter for name, parameter in block.named_parameters() if name in weights}


def biases_and_norms(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """Everything with one dimension."""
    return {name: parameter for name, parameter in block.named_parameters() if parameter.dim() == 1}


def nothing(block: nn.Module, linears: Mapping[str, LinearView]) -> Parameters:
    """What the pruner left stays, whatever the other fields say."""
    return {}


TRAINABLE: dict[str, Callable[[nn.Module, Mapping[str, LinearView]], Parameters]] = {
    "all": everything,
    "linears": only_linears,
    "bias_norm": biases_and_norms,
    "none": nothing,
}
