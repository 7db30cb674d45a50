"""Find a model's blocks, and call each one with its own arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reprune.errors import ConfigError, RunError
from reprune.model.documents import documents_apart


def find_blocks(model: nn.Module, num_blocks: int | None, path: str | None) -> nn.ModuleList:
    """The ModuleList at `path`, else the one of `num_blocks` modules with the most parameters (None: not known).

    Raises ConfigError, naming the key to set, when there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if path is not None:
        if path not in lists:
            raise ConfigError(
                "model.blocks_path", "no list of modules lies there", value=path, accepted=list(lists)
            )
        return lists[path]
    fitting = [module for module in lists.values() if len(module) == num_blocks]
    if not fitting:
        says = f"says it has {num_blocks} blocks, but no list of modules has that length"
        raise ConfigError(
            "model.blocks_path",
            f"the model {says if num_blocks is not None else 'does not say how many blocks it has'}",
            accepted=[f"{name} ({len(module)})" for name, module in lists.items()],
            hint="set model.blocks_path to the dotted path of the list of blocks",
        )
    return max(fitting, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


@dataclass(frozen=True)
class BlockCall:
    """The arguments a block is called with beside its hidden states, as the model passed them."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]

    def in_float32(self) -> BlockCall:
        """The same call with its floating-point arguments in float32, for training beside half-precision models."""
        positional, keywords = _floated(self.positional), _floated(self.keywords)
        return BlockCall(positional, keywords)

    def run(
        self,
        block: nn.Module,
        hidden_BTH: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        until: str | None = None,
    ) -> Tensor:
        """The block's hidden states for `hidden_BTH`; both are [batch, tokens, hidden].

        `weights` stand in for the block's own tensors of these names; with `until`, a path within the block, the
        output of that module is returned instead, and nothing behind it is computed.
        """
        positional = (hidden_BTH, *self.positional)
        if until is not None:
            with _stopping_at(block.get_submodule(until)) as reached:
                output = reached(
                    lambda: functional_call(block, dict(weights or {}), positional, self.keywords)
                )
            # Inside the block tokens may lie in one long row, as in OPT's MLP.
            return output.reshape(hidden_BTH.shape)
        if weights:
            return hidden_of(functional_call(block, dict(weights), positional, self.keywords))
        return hidden_of(block(*positional, **self.keywords))

    def run_up_to(self, block: nn.Module, hidden_BTH: Tensor, last: nn.Module) -> None:
        """Run the block for the sake of its hooks, those of `last` included; neither `last` nor what follows is computed."""

        def stop(module: nn.Module, positional: tuple[Any, ...]) -> None:
            raise _Reached(hidden_BTH)

        # Behind the hooks that are there already.
        handle = last.register_forward_pre_hook(stop)
        try:
            self.run(block, hidden_BTH)
        except _Reached:
            return
        finally:
            handle.remove()
        raise AssertionError("the module was not called")


class _Reached(Exception):  # noqa: N818 (no error: it ends a forward pass at the module that was asked for)
    def __init__(self, output: Tensor) -> None:
        self.output = output


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[Callable[[Callable[[], Any]], Tensor]]:
    def stop(module: nn.Module, positional: Any, output: Any) -> None:
        raise _Reached(hidden_of(output))

    def reached(forward: Callable[[], Any]) -> Tensor:
        try:
            forward()
        except _Reached as end:
            return end.output
        raise AssertionError("the module was not called")

    handle = module.register_forward_hook(stop)
    try:
        yield reached
    finally:
        handle.remove()


def _floated(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_floated(item) for item in value)
    if isinstance(value, dict):
        return {key: _floated(item) for key, item in value.items()}
    return value


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor), f"a block returned {type(hidden).__name__}"
    return hidden


Wraps = dict[type, tuple[Any, ...] | None]
"""By class of block: what it returns behind the hidden states, None where it returns these alone."""

Resident = Callable[[nn.Module], AbstractContextManager[None]]


class _Recorder:
    """Stands in for a block's forward: keeps the arguments, hands the hidden states on unchanged.

    The first block of each class runs for real once, which tells whether such blocks return a tensor or a tuple.
    """

    def __init__(self, wraps: Wraps, resident: Resident) -> None:
        self.resident = resident
        self.calls: list[BlockCall] = []
        self.first_hidden: Tensor | None = None
        self.wraps = wraps

    def stand_in(self, block: nn.Module) -> Any:
        real = block.forward
        first = next(iter(signature(real).parameters))

        def record(*positional: Any, **keywords: Any) -> Any:
            if positional:
                hidden, rest = positional[0], positional[1:]
            else:
                keywords = dict(keywords)
                hidden, rest = keywords.pop("hidden_states" if "hidden_states" in keywords else first), ()
            if self.first_hidden is None:
                self.first_hidden = hidden
            self.calls.append(BlockCall(rest, keywords))
            if type(block) not in self.wraps:
                with self.resident(block):
                    output = real(hidden, *rest, **keywords)
                self.wraps[type(block)] = output[1:] if isinstance(output, tuple) else None
            tail = self.wraps[type(block)]
            return hidden if tail is None else (hidden, *tail)

        return record


@contextmanager
def _standing_in(
    blocks: Sequence[nn.Module] | nn.ModuleList, stand_in: Callable[[nn.Module], Any]
) -> Iterator[None]:
    """In the context what `stand_in` makes of each block is called instead of its forward."""
    stand_ins = [stand_in(block) for block in blocks]
    try:
        for block, instead in zip(blocks, stand_ins, strict=True):
            block.forward = instead
        yield
    finally:
        for block in blocks:
            del block.forward


def passing_on(blocks: nn.ModuleList, states_BTH: Tensor, wraps: Wraps) -> AbstractContextManager[None]:
    """In the context no block computes anything, and the last of them puts out `states_BTH`."""

    def stand_in(block: nn.Module) -> Any:
        tail = wraps[type(block)]

        def put_out(*positional: Any, **keywords: Any) -> Any:
            return states_BTH if tail is None else (states_BTH, *tail)

        return put_out

    return _standing_in(blocks, stand_in)


def passing_through(blocks: Sequence[nn.Module], wraps: Wraps) -> AbstractContextManager[None]:
    """In the context each of `blocks` puts out the hidden states that enter it."""

    def stand_in(block: nn.Module) -> Any:
        tail, first = wraps[type(block)], next(iter(signature(block.forward).parameters))

        def hand_on(*positional: Any, **keywords: Any) -> Any:
            by_name = keywords.get("hidden_states", keywords.get(first))
            hidden = positional[0] if positional else by_name
            return hidden if tail is None else (hidden, *tail)

        return hand_on

    return _standing_in(blocks, stand_in)


@torch.no_grad()
def record_calls(
    base: nn.Module,
    blocks: nn.ModuleList,
    tokens_BT: Tensor,
    positions_BT: Tensor | None,
    wraps: Wraps,
    resident: Resident,
) -> tuple[Tensor, list[BlockCall]]:
    """What enters block 0, and each block's own arguments, for a batch of token ids [batch, tokens].

    Where `positions_BT` begin anew, the documents of a row are kept apart. `wraps` is filled with what blocks return;
    with all classes in it no block runs. `resident` has a block's weights in memory for a context. Replaying block 0's
    arguments for all blocks is wrong where attention types alternate.
    """
    recorder = _Recorder(wraps, resident)
    with _standing_in(blocks, recorder.stand_in), documents_apart(blocks, positions_BT):
        base(input_ids=tokens_BT, use_cache=False, **placed(base, positions_BT))
    if len(recorder.calls) != len(blocks) or recorder.first_hidden is None:
        raise RunError(
            f"{len(recorder.calls)} of {len(blocks)} blocks were called in one forward pass; "
            "set model.blocks_path to the list that holds every block of the text model"
        )
    return recorder.first_hidden, recorder.calls


def placed(model: nn.Module, positions_BT: Tensor | None) -> dict[str, Tensor]:
    """The keyword that tells a model where its tokens stand; none for a model that counts relative positions only."""
    takes = "position_ids" in signature(type(model).forward).parameters
    return {"position_ids": positions_BT} if positions_BT is not None and takes else {}


def same_calls(first: list[BlockCall], second: list[BlockCall]) -> bool:
    """Whether two recordings hold equal arguments, tensors compared by value."""
    return all(
        _same(one.positional, other.positional) and _same(one.keywords, other.keywords)
        for one, other in zip(first, second, strict=True)
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other)
