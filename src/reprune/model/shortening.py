"""A model without some of its blocks: those that stay are numbered anew, and its config says what it now is.

No architecture is known here. What a block derives from its number is found by building the model that the shortened
config stands for, and holding its blocks against those of the dense model: an attribute that was the one number and is
the other is set anew; whatever else differs cannot be said by the config, and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from reprune.errors import ConfigError, RunError
from reprune.model.blocks import passing_through
from reprune.model.checkpoint import ModelSource
from reprune.model.description import outline
from reprune.model.loading import LoadedModel

_PLAIN = (bool, int, float, str, type(None))
_TOKENS = 8
_ROUNDING = 4


@dataclass(frozen=True)
class Renumbered:
    """An attribute that holds a block's number: where it lies, in the block by its old number, and the new one."""

    block: int
    path: str
    attribute: str
    number: int


def shorten_config(config: Any, kept: Sequence[int]) -> None:
    """Make a transformers config that of a model with only the blocks `kept`, in place.

    Besides the number of blocks: lists with an entry a block, and lists of block numbers.
    """
    text = config.get_text_config()
    num_blocks = int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if not isinstance(value, list | tuple) or "token" in name:
            continue
        if _are_numbers(name, value, num_blocks):
            changed = [kept.index(block) for block in value if block in kept]
        elif len(value) == num_blocks:
            changed = [value[block] for block in kept]
        else:
            continue
        setattr(text, name, type(value)(changed))
    text.num_hidden_layers = len(kept)


def _are_numbers(name: str, value: Sequence[Any], num_blocks: int) -> bool:
    """Whether a list names blocks rather than having an entry for each."""
    if not any(word in name for word in ("layer", "block")):
        return False
    if not all(isinstance(it, int) and not isinstance(it, bool) and 0 <= it < num_blocks for it in value):
        return False
    ascending = all(one < other for one, other in pairwise(value))
    return ascending and (len(value) != num_blocks or list(value) == list(range(num_blocks)))


def renumbering(
    source: ModelSource, model: Any, blocks: nn.ModuleList, kept: Sequence[int]
) -> tuple[Any, list[Renumbered]]:
    """The model that stands for `model` without the blocks that are not `kept`, on the meta device, and what to renumber.

    `model` and its `blocks` are as the dense config makes them; only shapes and attributes are read. Raises ConfigError
    where the shortened config makes another model than what is left of the dense one.
    """
    config = copy.deepcopy(model.config)
    if not hasattr(config.get_text_config(), "num_hidden_layers"):
        raise _refused("the config does not say how many blocks there are")
    shorten_config(config, kept)
    try:
        twin, twin_blocks = outline(config, source)
    except ConfigError as error:
        raise _refused(f"no model can be made of the shortened config ({error.problem})") from error
    if len(twin_blocks) != len(kept):
        raise _refused(f"the shortened config makes {len(twin_blocks)} blocks instead of {len(kept)}")
    changes = []
    for number, block in enumerate(kept):
        changes += _compared(blocks[block], twin_blocks[number], block, number)
    _check_outside(model, blocks, twin, twin_blocks)
    return twin, changes


def _compared(block: nn.Module, twin: nn.Module, old: int, new: int) -> list[Renumbered]:
    """What has to be set in a block to make it its twin. ConfigError where that is more than its number."""
    ours, theirs = dict(block.named_modules()), dict(twin.named_modules())
    where = f"block {old}, as block {new},"
    if list(ours) != list(theirs) or any(type(ours[path]) is not type(theirs[path]) for path in ours):
        raise _refused(f"{where} would be built of other modules")
    if _shapes(block) != _shapes(twin):
        raise _refused(f"{where} would have other parameters")
    changes = []
    for path, module in ours.items():
        mine, its = _attributes(module), _attributes(theirs[path])
        for name in sorted({*mine, *its}):
            given, wanted = mine.get(name), its.get(name)
            if given == wanted and type(given) is type(wanted):
                continue
            if type(given) is int and type(wanted) is int and (given, wanted) == (old, new):
                changes.append(Renumbered(old, path, name, new))
                continue
            place = f"{path}.{name}".removeprefix(".")
            raise _refused(f"{where} would have {place} = {wanted} instead of {given}")
    return changes


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes that are numbers, words, or rows of such."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _check_outside(model: Any, blocks: nn.ModuleList, twin: Any, twin_blocks: nn.ModuleList) -> None:
    def outside(whole: Any, inside: nn.ModuleList) -> dict[str, tuple[int, ...]]:
        [root] = [path for path, module in whole.named_modules() if module is inside]
        return {name: shape for name, shape in _shapes(whole).items() if not name.startswith(f"{root}.")}

    ours, theirs = outside(model, blocks), outside(twin, twin_blocks)
    differ = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    if differ:
        raise _refused(f"{differ[0]} lies outside the blocks and goes with their number")


def _refused(problem: str) -> ConfigError:
    return ConfigError(
        "",
        f"the model cannot be saved without these blocks: {problem}",
        accepted="blocks whose number changes nothing but their number",
        hint="name other blocks with transform.count=null 'transform.blocks=[…]', the last ones above all, or use another model",
    )


def remove_blocks(blocks: nn.ModuleList, kept: Sequence[int]) -> None:
    """Take all but `kept` out of the list, in place."""
    for block in reversed(range(len(blocks))):
        if block not in kept:
            del blocks[block]


@torch.no_grad()
def shortened(model: LoadedModel, source: ModelSource, kept: Sequence[int], tokens_NT: Tensor) -> LoadedModel:
    """The model with only the blocks `kept` (ascending), numbered anew; the one that is given is used up.

    Two things are checked on the first of `tokens_NT`, up to rounding: that the logits are those of the dense model with the
    other blocks passed over, and that the model which the new config makes has them too. ConfigError where the config
    cannot express it, RunError where a number is not what it was.
    """
    tokens = tokens_NT[:1, :_TOKENS]
    dense, dense_blocks = outline(copy.deepcopy(model.model.config), source)
    twin, changes = renumbering(source, dense, dense_blocks, kept)
    plan = model.plan
    model.embed(tokens)
    gone = [block for number, block in enumerate(model.blocks) if number not in kept]
    with model.holding(model.model), passing_through(gone, model.wraps):
        wanted = model.logits(tokens)
    for change in changes:
        setattr(model.blocks[change.block].get_submodule(change.path), change.attribute, change.number)
    for config in _configs(model.model):
        shorten_config(config, kept)
    remove_blocks(model.blocks, kept)
    numbers = range(len(model.blocks) + len(gone)) if model.dense_numbers is None else model.dense_numbers
    left = LoadedModel(
        model.name,
        model.model,
        model.tokenizer,
        model.blocks,
        plan,
        {**model.identity, "kept_blocks": list(kept)},
        dense_numbers=[numbers[block] for block in kept],
    )
    with left.holding(model.model):
        _check_equal(left, wanted, left.logits(tokens), "with these blocks passed over")
        with _filled(twin, model.model):
            told = twin(input_ids=tokens.to(plan.device), use_cache=False).logits
        _check_equal(left, told, wanted, "as its config makes it")
    return left


def _configs(model: nn.Module) -> list[Any]:
    """The config, and copies of its text part that modules of the model keep for themselves: each once."""
    own: Any = model.config
    text = own.get_text_config()
    found = {id(text): own}
    for module in model.modules():
        kept = vars(module).get("config")
        if type(kept) is type(text) and id(kept) not in found:
            found[id(kept)] = kept
    return list(found.values())


@contextmanager
def _filled(twin: nn.Module, model: nn.Module) -> Iterator[None]:
    """A model on the meta device with the tensors of another, for the time of the context."""
    twin.eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    buffers = dict(model.named_buffers())
    for path, module in twin.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = f"{path}.{name}".removeprefix(".")
            if buffer.is_meta:
                if full not in buffers:
                    raise RunError(f"the shortened model would have a buffer {full} that the dense one lacks")
                setattr(module, name, buffers[full])
    try:
        yield
    finally:
        twin.to("meta")


def _check_equal(model: LoadedModel, one: Tensor, other: Tensor, what: str) -> None:
    scale = float(other.abs().max())
    if not float((one - other).abs().max()) <= _ROUNDING * torch.finfo(other.dtype).eps * scale:
        raise RunError(
            f"{model.name}: without the dropped blocks it computes something else than {what}; its blocks depend on "
            "their number in a way that is not seen in them, so that none can be dropped"
        )
