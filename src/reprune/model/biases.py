"""Biases for linears that have none: zero at first, so that the model computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel

FLAGS = ("attention_bias", "mlp_bias", "use_bias", "bias", "use_qkv_bias", "qkv_bias", "enable_bias")
"""By what keys configs of transformers say that linears have biases."""


def give_biases(model: LoadedModel, layers: Collection[str]) -> None:
    """Give the linears `layers` ('block.name') of a model a bias each, in place, unless they have one.

    Where the model's config can tell of them, it does from now on, and the linears that it then means too get theirs.
    """
    views = {f"{block}.{name}": view for block, own in enumerate(model.linears) for name, view in own.items()}
    paths = {f"{model.blocks_path}.{block}.{view.bias}" for block, view in _lacking(views, layers)}
    if not paths:
        return
    flags = _flags(model.model, paths)
    if flags is not None:
        config = model.model.config.get_text_config()
        paths |= _biases(model.model, flags) - _names(model.model)
        for flag in flags:
            setattr(config, flag, True)
    for path in sorted(paths):
        module = model.model.get_submodule(path.removesuffix(".bias"))
        weight = module.weight
        assert isinstance(module, nn.Linear)
        zeros = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)


def _lacking(views: dict[str, LinearView], layers: Collection[str]) -> Iterator[tuple[int, LinearView]]:
    for name in layers:
        if views[name].module.bias is None:
            yield int(name.partition(".")[0]), views[name]


def told_of(model: nn.Module, paths: Collection[str]) -> bool:
    """Whether a model's config can tell of the biases `paths`, beside those that the model has."""
    missing = set(paths) - _names(model)
    return not missing or _flags(model, missing) is not None


def _flags(model: Any, paths: Collection[str]) -> list[str] | None:
    """The flags of a model's config that bring about all of the biases `paths`; None where some come with none of them."""
    text, plain = model.config.get_text_config(), _names(model)
    off = [flag for flag in FLAGS if getattr(text, flag, None) is False]
    brings = {flag: _biases(model, [flag]) - plain for flag in off}
    chosen = [flag for flag, found in brings.items() if found & set(paths)]
    found = set[str]().union(*(brings[flag] for flag in chosen))
    return chosen if set(paths) <= found else None


def _biases(model: Any, flags: Collection[str]) -> set[str]:
    """The biases that the model would have with these flags."""
    changed = copy.deepcopy(model.config)
    for flag in flags:
        setattr(changed.get_text_config(), flag, True)
    with torch.device("meta"):
        made = type(model)(changed)
    return {name for name in _names(made) if name.endswith(".bias")}


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}
