"""A smaller model of one whose units are gone: its layers sliced, its config changed to match."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from reprune.model.coupling import Coupling, find_couplings
from reprune.model.loading import LoadedModel
from reprune.model.targets import mixes_tokens

Masks = Mapping[int, Mapping[str, Tensor]]

_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
_HEADS = "num_attention_heads"
_SHARED = ("num_key_value_heads", "num_kv_heads")
_HEAD_WIDTH = "head_dim"
_REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)
"""What configs and models of transformers raise for sizes that they cannot have."""

_Cuts = dict[str, dict[int, Tensor]]
"""By tensor of the model: which of its slices stay, bool, by dimension."""


class NotExpressibleError(Exception):
    """Why what is left of a model cannot be written as a smaller one."""


@dataclass(frozen=True)
class Compact:
    """A smaller model on the host, which submodules of its blocks are smaller, and why others keep their zeros."""

    model: LoadedModel
    smaller: tuple[str, ...]
    remarks: tuple[str, ...]


def compact(model: LoadedModel, masks: Masks) -> Compact:
    """The model without the units that `masks` remove: bool, True where a weight stays, stored layout, by block and layer.

    A unit (see `model.coupling`) is gone where all its columns of the consumer are masked. The rows that produce it and
    their biases go, and these columns; whatever else there is stays, the consumer's own bias too. A config has one
    number of heads and one width for all blocks, and not every architecture lets both be chosen freely: each kind of
    submodule is made smaller where the model that the changed config makes has just the shapes of what is left, and
    stays as it is elsewhere, said in the remarks. Tensors that are not sliced are shared with the model.

    Raises NotExpressibleError where nothing can be made smaller.
    """
    changes: dict[str, int] = {}
    smaller: list[_Part] = []
    remarks = []
    for submodule, parts in _by_submodule(model, masks).items():
        try:
            changes |= _config_changes(model, parts)
            smaller += parts
        except NotExpressibleError as error:
            remarks.append(f"{submodule} keeps its zeros: {error}")
    if not smaller:
        raise NotExpressibleError("; ".join(remarks) or "no unit was removed")
    cuts = _cuts(model, smaller)
    made = _made(model, changes)
    _check_shapes(model, cuts, made, changes)
    state = {name: _cut(tensor, cuts.get(name, {})) for name, tensor in model.model.state_dict().items()}
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    made.generation_config = model.model.generation_config
    names = dict.fromkeys(part.coupling.submodule for part in smaller)
    return Compact(model.with_model(made), tuple(names), tuple(remarks))


@dataclass(frozen=True)
class _Part:
    """The units of one submodule of one block, and which of them stay, bool [units]."""

    block: int
    coupling: Coupling
    kept: Tensor


def _by_submodule(model: LoadedModel, masks: Masks) -> dict[str, list[_Part]]:
    """By submodule its parts in all blocks that have it, of those that lost a unit in any block."""
    found: dict[str, list[_Part]] = {}
    if all(keep.all() for layers in masks.values() for keep in layers.values()):
        return found
    for block, views in enumerate(model.linears):
        own = masks.get(block, {})
        for coupling in find_couplings(model, block):
            kept = torch.ones(len(coupling.columns), dtype=torch.bool)
            if coupling.consumer in own:
                keep = views[coupling.consumer].orient(own[coupling.consumer].cpu())
                kept = keep.any(dim=0)[coupling.columns].any(dim=1)
            found.setdefault(coupling.submodule, []).append(_Part(block, coupling, kept))
    return {name: parts for name, parts in found.items() if not all(part.kept.all() for part in parts)}


def _config_changes(model: LoadedModel, parts: Sequence[_Part]) -> dict[str, int]:
    """The keys of the config, with their values, that make this one submodule smaller in all blocks."""
    counts = [int(part.kept.sum()) for part in parts]
    sizes = {(len(part.kept), part.coupling.columns.shape[1], count) for part, count in zip(parts, counts, strict=True)}  # fmt: skip
    if len(sizes) > 1:
        raise NotExpressibleError(
            f"between {min(counts)} and {max(counts)} of its units are left, by block, and the config has one number for all"
        )
    cuts = _cuts(model, parts)
    problems = []
    try:
        for changes in _candidates(model, parts[0]):
            try:
                _check_shapes(model, cuts, _made(model, changes), changes)
            except NotExpressibleError as error:
                problems.append(str(error))
            else:
                return changes
    except _REFUSALS as error:
        problems.append(_reason(error))
    raise NotExpressibleError("; ".join(problems) or "no key of the config is its size")


def _candidates(model: LoadedModel, part: _Part) -> Iterator[dict[str, int]]:
    """What to change in the config, by what attributes of that meaning are called in transformers' configs."""
    config = model.model.config.get_text_config()
    units, left = len(part.kept), int(part.kept.sum())
    width = part.coupling.columns.shape[1]
    if not mixes_tokens(model.blocks[part.block], model.linears[part.block][part.coupling.consumer]):
        for name in _WIDTHS:
            # A width that is not given is derived from another one.
            if hasattr(config, name) and getattr(config, name) in (None, units * width):
                yield {name: left * width}
        return
    heads = getattr(config, _HEADS, None)
    if heads is None or heads % units:
        return
    changes = {_HEADS: heads // units * left}
    for name in _SHARED:
        shared = getattr(config, name, None)
        if shared is not None and shared % units == 0:
            changes[name] = shared // units * left
    if getattr(config, _HEAD_WIDTH, None) is None:
        # Otherwise it would be derived from the number of heads.
        changes[_HEAD_WIDTH] = width * units // heads
    yield changes


def _made(model: LoadedModel, changes: Mapping[str, int]) -> Any:
    """The model that the changed config makes, on the meta device."""
    try:
        config = copy.deepcopy(model.model.config)
        text = config.get_text_config()
        for name, value in changes.items():
            setattr(text, name, value)
        # As it will be read from its file: sizes are checked and derived then.
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            return type(model.model)(config)
    except _REFUSALS as error:
        raise NotExpressibleError(f"its config refuses {_in_words(changes)}: {_reason(error)}") from error


def _cuts(model: LoadedModel, parts: Sequence[_Part]) -> _Cuts:
    """Columns of the consumers; rows of the producers, and entries of their biases."""
    found: _Cuts = {}

    def take(key: str, dimension: int, size: int, gone: Tensor) -> None:
        keep = found.setdefault(key, {}).setdefault(dimension, torch.ones(size, dtype=torch.bool))
        keep[gone] = False

    for part in parts:
        views, coupling = model.linears[part.block], part.coupling
        root = f"{model.blocks_path}.{part.block}"
        view = views[coupling.consumer]
        columns = coupling.columns[~part.kept].flatten()
        take(f"{root}.{view.parameter}", int(not view.transposed), view.shape[1], columns)
        for name, places in coupling.rows.items():
            view, rows = views[name], places[~part.kept].flatten()
            take(f"{root}.{view.parameter}", int(view.transposed), view.shape[0], rows)
            if getattr(view.module, "bias", None) is not None:
                take(f"{root}.{view.parameter.rpartition('.')[0]}.bias", 0, view.shape[0], rows)
    return found


def _cut(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    for dimension, keep in cuts.items():
        tensor = tensor.index_select(dimension, keep.nonzero().flatten())
    return tensor


def _check_shapes(model: LoadedModel, cuts: _Cuts, made: nn.Module, changes: Mapping[str, int]) -> None:
    """NotExpressibleError, naming the first tensor, unless the made model has just the shapes of what is left."""
    left = {}
    for name, tensor in model.model.state_dict().items():
        shape = list(tensor.shape)
        for dimension, keep in cuts.get(name, {}).items():
            shape[dimension] = int(keep.sum())
        left[name] = shape
    there = {name: list(tensor.shape) for name, tensor in made.state_dict().items()}
    for name in dict.fromkeys([*left, *there]):
        if left.get(name) != there.get(name):
            raise NotExpressibleError(
                f"with {_in_words(changes)} in its config {name} would be {there.get(name, 'nowhere')}, "
                f"not {left.get(name, 'nowhere')}"
            )


def _in_words(changes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items())


def _reason(error: Exception) -> str:
    # A refusal of a config names the check in its first line and the reason in its last.
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
