"""A causal model in two halves: its final hidden states, and its head for some of them at a time.

The trunk is the outermost module that holds the blocks and is called in a forward pass of the whole model: its base
model, or, as OPT does it, the decoder within. Everything else, the output embedding, a projection, a scale, a cap on the
logits, is the head, and runs as the model itself runs it. A model whose blocks hang on the causal model itself has no
trunk: its 'final hidden states' here are its whole logits, and its head hands them on. Results are the same, memory is not.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reprune.errors import RunError
from reprune.model.blocks import hidden_of
from reprune.model.loading import LoadedModel

LOGITS_AT_ONCE = 2**24
"""How many logits the head makes at once: 64 MiB in float32."""

_TRUNKS: WeakKeyDictionary[nn.Module, tuple[nn.Module, Any] | None] = WeakKeyDictionary()
"""By model: its trunk, and what the trunk returned for a single token; None for a model without."""


@torch.no_grad()
def final_hidden(model: LoadedModel, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """What the head is given for token ids [rows, tokens]: [rows, tokens, hidden], after the final norm, on the device.

    `positions_BT` begin anew at each text of a row; None where each row is one text. Whole logits [rows, tokens,
    vocabulary] where the model has no trunk. The caller holds the model on its device.
    """
    parts = _parts(model)
    if parts is None:
        return model.logits(tokens_BT, positions_BT)
    _, output = _until_trunk(model, tokens_BT, positions_BT)
    return _state_in(output)


@torch.no_grad()
def states_by_depth(model: LoadedModel, tokens_BT: Tensor) -> list[Tensor]:
    """What every block puts out, then `final_hidden`: each [rows, tokens, hidden], on the device.

    The caller holds the model on its device, with room for that many states.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(hidden_of(output).detach().clone())

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        final = final_hidden(model, tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(model.blocks):
        raise RunError(f"{len(found)} of {len(model.blocks)} blocks were called in one forward pass")
    return [*found, final]


@torch.no_grad()
def head_logits(model: LoadedModel, hidden: Tensor) -> Tensor:
    """Logits [positions, vocabulary] of final hidden states [positions, hidden], in the model's dtype, on the device.

    The causal model's own forward runs, its trunk replaced by these states, so that whatever the architecture does
    behind it (scale, cap, projection) is done. The caller holds the model on its device.
    """
    hidden = hidden.to(model.plan.device)
    parts = _parts(model)
    if parts is None:
        return hidden
    trunk, recorded = parts
    given = _with_state(recorded, hidden[None])
    # Whatever the ids are: only the trunk would read them.
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with _standing_in(trunk, lambda *positional, **keywords: given):
        logits = model.model(input_ids=ids, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[0]


def in_chunks(model: LoadedModel, num_positions: int, copies: int = 1) -> Iterator[slice]:
    """Slices of positions, of which the head makes at most LOGITS_AT_ONCE logits, `copies` times."""
    size = max(1, LOGITS_AT_ONCE // (copies * vocabulary_size(model)))
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


def vocabulary_size(model: LoadedModel) -> int:
    """How many logits a position has."""
    if model.trimmed is not None:
        return model.trimmed.num_ids
    return int(model.model.get_output_embeddings().weight.shape[0])


def has_trunk(model: LoadedModel) -> bool:
    """Whether hidden states can be had without logits; the caller holds the model on its device."""
    return _parts(model) is not None


def head_hash(model: LoadedModel) -> str:
    """Hash of the head's tensors, by name: those outside the trunk, and the output embedding, which may be tied.

    'none' for a model without a trunk.
    """
    parts = _parts(model)
    if parts is None:
        # Its final hidden states are the logits: no head is needed to make these.
        return "none"
    inside = {id(tensor) for tensor in _tensors(parts[0]).values()}
    tied = model.model.get_output_embeddings().weight
    tensors = {
        name: it for name, it in _tensors(model.model).items() if id(it) not in inside and it is not tied
    }
    tensors["the output embedding"] = tied
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _parts(model: LoadedModel) -> tuple[nn.Module, Any] | None:
    """The trunk, and what it returns; traced once a model."""
    if model.model not in _TRUNKS:
        _TRUNKS[model.model] = _until_trunk(model, torch.zeros(1, 1, dtype=torch.long), or_none=True)
    return _TRUNKS[model.model]


class _TrunkDone(Exception):  # noqa: N818 (no error: it ends a forward pass before the head)
    def __init__(self, trunk: nn.Module, output: Any) -> None:
        self.trunk = trunk
        self.output = output


@torch.no_grad()
def _until_trunk(
    model: LoadedModel, tokens_BT: Tensor, positions_BT: Tensor | None = None, *, or_none: bool = False
) -> Any:
    """The trunk and its output in a forward pass that ends there; None, if `or_none`, where none was called."""
    holders = _holders(model)
    inside: list[nn.Module] = []

    def enter(module: nn.Module, positional: Any) -> None:
        inside.append(module)

    def leave(module: nn.Module, positional: Any, output: Any) -> None:
        inside.pop()
        if not inside:
            raise _TrunkDone(module, output)

    handles = [holder.register_forward_pre_hook(enter) for holder in holders]
    handles += [holder.register_forward_hook(leave) for holder in holders]
    try:
        if holders or not or_none:
            model.logits(tokens_BT, positions_BT)
    except _TrunkDone as end:
        return end.trunk, end.output
    finally:
        for handle in handles:
            handle.remove()
    assert or_none, "the trunk was called before and is not now"
    return None


def _holders(model: LoadedModel) -> list[nn.Module]:
    """The modules between the causal model and its blocks that can be called, outermost first."""
    steps = model.blocks_path.split(".")[:-1]
    paths = [".".join(steps[: count + 1]) for count in range(len(steps))]
    found = [model.model.get_submodule(path) for path in paths]
    return [module for module in found if not isinstance(module, nn.ModuleList | nn.ModuleDict)]


def _state_in(output: Any) -> Tensor:
    """The last hidden state in what a trunk returned: a tensor, a tuple, or a ModelOutput."""
    state = getattr(output, "last_hidden_state", None)
    return state if isinstance(state, Tensor) else hidden_of(output)


def _with_state(output: Any, hidden_BTH: Tensor) -> Any:
    """The same output with another last hidden state."""
    if isinstance(output, Tensor):
        return hidden_BTH
    if isinstance(output, tuple):
        return (hidden_BTH, *output[1:])
    made = copy.copy(output)
    made.last_hidden_state = hidden_BTH
    return made


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
