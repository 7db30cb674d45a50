"""Units of attention and MLP that go or stay as a whole, found by gradients: heads with their key/value head, channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reprune.errors import RunError
from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel
from reprune.model.submodules import Submodule
from reprune.seeding import generator

_TOKENS = 32
"""So many that a ReLU is shut for all of them in one channel of 2**32."""

_SEQUENCES = 8
"""Each asks for one column in the same backward pass, as none has anything to do with another."""

_Structure = tuple[type, tuple[tuple[str, int, int], ...]]

_KNOWN: WeakKeyDictionary[nn.Module, dict[_Structure, list[Coupling]]] = WeakKeyDictionary()
"""By model, then by the class of a block and the names and shapes of its linears."""


@dataclass(frozen=True)
class Coupling:
    """Units of one submodule that go or stay as a whole.

    `consumer` is the path within the block of the linear whose input features the units are, and `columns` [units,
    features a unit] are columns of its weight [d_out, d_in]. `rows`, by producing layer, [units, rows a unit], are rows
    of that layer's weight [d_out, d_in]: what they put out reaches the columns of their own unit alone, so that with
    these columns at zero they no longer matter. Units are in the order of their first columns.
    """

    submodule: str
    consumer: str
    columns: Tensor
    rows: Mapping[str, Tensor]


def find_couplings(model: LoadedModel, block: int) -> list[Coupling]:
    """The units of each submodule of a block, in the order in which the submodules are computed.

    Row and column belong together where the gradient of the consumer's input by the row's output is not zero, in a
    copy of the block with random weights. Only what happens between two linears counts: a layer that reaches the
    consumer through other linears alone, as the first factor of a low-rank projection does, has no rows here. Heads
    that share a key/value head are one unit; so are all heads where one norm spans the queries or keys of all of them.

    Left out are submodules with experts and those in which no linear reaches the last one. Raises RunError where units
    differ in size.
    """
    linears = model.linears[block]
    structure = type(model.blocks[block]), tuple((name, *view.shape) for name, view in linears.items())
    known = _KNOWN.setdefault(model.model, {})
    if structure not in known:
        # Whoever prunes does so without gradients.
        with model.resident(model.blocks[block]), torch.enable_grad():
            known[structure] = _find(model, block)
    return list(known[structure])


@dataclass(frozen=True)
class _Call:
    """One call of a linear: what it was given, and what it put out, at which gradients end."""

    name: str
    given: Tensor
    put_out: Tensor


def _find(model: LoadedModel, block: int) -> list[Coupling]:
    linears = model.linears[block]
    stream = generator(0, "couplings")
    random = _with_random_weights(model.blocks[block], stream).to(model.plan.device)
    # Any tokens will do: only the shape of what enters the blocks is looked at.
    shape = model.embed(torch.zeros(_SEQUENCES, _TOKENS, dtype=torch.long)).shape
    hidden = torch.randn(shape, generator=stream)
    call = model.call(block, _SEQUENCES, _TOKENS).in_float32()
    with _cutting(random, linears) as calls:
        call.run(random, hidden.to(model.plan.device))
    found = []
    for submodule in model.submodules(block):
        views = [view for view in linears.values() if _within(view, submodule)]
        if any(view.is_expert for view in views):
            continue
        names = {view.name for view in views}
        own = [call for call in calls if call.name in names]
        try:
            coupling = _coupling(submodule.name, own, linears, stream)
        except _UnitsError as error:
            raise RunError(
                f"{model.name}: {submodule.name} in block {block} cannot be pruned by units: {error}"
            ) from None
        found += [coupling] if coupling else []
    return found


@torch.no_grad()
def _with_random_weights(block: nn.Module, stream: torch.Generator) -> nn.Module:
    """A copy in float32 in which no weight is zero: pruned or dead weights would hide what they connect."""
    made = copy.deepcopy(block).float().eval()
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=stream)
        if parameter.dim() >= 2:
            noise /= parameter.shape[-1] ** 0.5
        else:
            noise = 0.2 * noise + (0 if name.endswith("bias") else 1)
        parameter.copy_(noise)
    return made


@contextmanager
def _cutting(block: nn.Module, linears: Mapping[str, LinearView]) -> Iterator[list[_Call]]:
    """Keep every call of a linear in order; gradients end at what it puts out."""
    calls: list[_Call] = []

    def hook(name: str) -> Any:
        def cut(module: nn.Module, positional: tuple[Tensor, ...], output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            calls.append(_Call(name, positional[0], leaf))
            # A leaf itself must not be written to, as activations in place do.
            return leaf.clone()

        return cut

    modules = [name for name, view in linears.items() if view.index is None]
    handles = [block.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _within(view: LinearView, submodule: Submodule) -> bool:
    return any(view.name == path or view.name.startswith(f"{path}.") for path in submodule.modules)


class _UnitsError(Exception):
    """Why a submodule has no units that can be pruned."""


def _coupling(
    submodule: str, calls: Sequence[_Call], linears: Mapping[str, LinearView], stream: torch.Generator
) -> Coupling | None:
    consumer = calls[-1].name
    inputs = torch.cat([_by_sequence(call.given) for call in calls if call.name == consumer], dim=1)
    producing = [call for call in calls if call.name != consumer]
    # Columns of the consumer come first among the nodes, then the rows of one producer after the other.
    num_columns = stop = inputs.shape[-1]
    spans: dict[str, slice] = {}
    for name in dict.fromkeys(call.name for call in producing):
        spans[name] = slice(stop, stop + linears[name].shape[0])
        stop = spans[name].stop

    reaching = torch.zeros(stop, dtype=torch.bool)
    units = torch.arange(stop)
    weights = torch.randn(inputs.shape[:2], generator=stream).to(inputs.device)
    features = torch.einsum("st,stf->sf", weights, inputs)
    for start in range(0, num_columns, _SEQUENCES):
        # Column start + s of sequence s: a diagonal, which is shorter where the columns end.
        asked = features[:, start : start + _SEQUENCES].diagonal()
        reached = _reached(asked.sum(), producing, spans, stop)
        for column, nodes in enumerate(reached[: len(asked)], start):
            reaching |= nodes
            nodes[column] = True
            _join(units, nodes)
    if not reaching.any():
        return None
    _join_chains(units, reaching, producing, spans, stream)

    num_units = len(torch.unique(units[:num_columns]))
    tables = {name: _table(units[span], num_columns, num_units, name) for name, span in spans.items()}
    return Coupling(
        submodule,
        consumer,
        _table(units[:num_columns], num_columns, num_units, consumer),
        {name: table for name, table in tables.items() if table.numel()},
    )


def _by_sequence(states: Tensor) -> Tensor:
    """[sequences, tokens, features] of what a linear was given or put out; some are given all tokens in one row."""
    if states.shape[0] not in (_SEQUENCES, _SEQUENCES * _TOKENS):
        raise _UnitsError(f"a linear is given {list(states.shape)}, in which sequences do not come first")
    return states.reshape(_SEQUENCES, -1, states.shape[-1])


def _reached(target: Tensor, producing: Sequence[_Call], spans: Mapping[str, slice], size: int) -> Tensor:
    """By sequence the nodes, as masks [sequences, nodes], by whose output a number has a gradient."""
    found = torch.zeros(_SEQUENCES, size, dtype=torch.bool)
    leaves = [call.put_out for call in producing]
    if not leaves or not target.requires_grad:
        return found
    gradients = torch.autograd.grad(target, leaves, retain_graph=True, allow_unused=True)
    for call, gradient in zip(producing, gradients, strict=True):
        if gradient is not None:
            found[:, spans[call.name]] |= _by_sequence(gradient).any(dim=1).cpu()
    return found


def _join(units: Tensor, nodes: Tensor) -> None:
    """Make one unit, in place, of all units that have one of the nodes; it is called by its first node."""
    labels = torch.unique(units[nodes])
    units[torch.isin(units, labels)] = labels[:1]


def _join_chains(
    units: Tensor,
    reaching: Tensor,
    producing: Sequence[_Call],
    spans: Mapping[str, slice],
    stream: torch.Generator,
) -> None:
    """Join a row that reaches the consumer with the rows that it reaches through further linears."""
    leads_to = {}
    for name, span in spans.items():
        leads_to[name] = torch.zeros_like(reaching)
        leads_to[name][span] = reaching[span]
    for call in reversed(producing):
        weights = torch.randn(call.given.shape, generator=stream).to(call.given.device)
        feeding = _reached((weights * call.given).sum(), producing, spans, len(units)).any(dim=0)
        for name, span in spans.items():
            if feeding[span].any():
                leads_to[name] |= leads_to[call.name]
        if (feeding & reaching).any() and leads_to[call.name].any():
            _join(units, (feeding & reaching) | leads_to[call.name])


def _table(labels: Tensor, num_columns: int, num_units: int, name: str) -> Tensor:
    """Of each unit its members [units, members a unit], from the unit of each; those with no column are in none."""
    [members] = torch.nonzero(labels < num_columns, as_tuple=True)
    order = labels[members].argsort(stable=True)
    counts = torch.unique(labels[members], return_counts=True)[1].tolist()
    counts += [0] * (num_units - len(counts))
    if len(set(counts)) > 1:
        raise _UnitsError(f"they have between {min(counts)} and {max(counts)} features of {name}")
    return members[order].reshape(num_units, -1)
