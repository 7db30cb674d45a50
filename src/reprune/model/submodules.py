"""Attention and MLP of a block, found by what calls what: the modules, and where their output is before it is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reprune.errors import RunError
from reprune.model.blocks import BlockCall
from reprune.model.linears import LinearView


@dataclass(frozen=True)
class Submodule:
    """A part of a block between two residual adds.

    `modules` are the paths of the modules that make it up, `output` the path of the one whose output is what the block
    adds to its residual stream.
    """

    name: str
    modules: tuple[str, ...]
    output: str


@dataclass
class _Trace:
    """Modules in the order in which they ended, with the tensor each was given first and the one it put out."""

    ended: list[tuple[str, Tensor | None, Tensor | None]]


@torch.no_grad()
def find_submodules(
    block: nn.Module, linears: Mapping[str, LinearView], call: BlockCall, hidden_BTH: Tensor
) -> list[Submodule]:
    """The submodules of a block in the order in which they are computed, from one forward pass.

    Prunable layers below one child of the block belong together, and so do those that are children of the block
    themselves. The output is the last layer's; a norm that is given exactly that tensor, as where the output is
    normalised before it is added, belongs to the submodule and puts out its output. Raises RunError for a block
    whose layers are not called.
    """
    with _tracing(block) as trace:
        call.run(block, hidden_BTH)
    groups: dict[str, list[LinearView]] = {}
    for view in linears.values():
        groups.setdefault(view.name.split(".")[0] if "." in view.name else "", []).append(view)
    order = [path for path, _, _ in trace.ended]
    found = []
    for child, views in groups.items():
        modules = (child,) if child else tuple(view.name for view in views)
        if any(view.is_expert for view in views):
            # Experts are added up in their container, which is the submodule itself.
            output = child
        else:
            called = [view.name for view in views if view.name in order]
            if not called:
                raise RunError(f"layer {views[0].name} was not called in the forward pass of its block")
            output = max(called, key=order.index)
        while following := _norm_of(block, trace, output):
            modules, output = (*modules, following), following
        found.append(Submodule(child or "+".join(modules), modules, output))
    return sorted(found, key=lambda submodule: order.index(submodule.output))


def _norm_of(block: nn.Module, trace: _Trace, output: str) -> str | None:
    """A child of the block with parameters that was given exactly what the module `output` put out."""
    [tensor] = [put_out for path, _, put_out in trace.ended if path == output][-1:]
    for path, given, _ in trace.ended:
        child = "." not in path and path != output
        if child and given is not None and given is tensor and any(True for _ in block.get_submodule(path).parameters()):  # fmt: skip
            return path
    return None


@contextmanager
def _tracing(block: nn.Module) -> Iterator[_Trace]:
    trace = _Trace([])

    def hook(path: str) -> Any:
        def ended(module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            given = positional[0] if positional else None
            trace.ended.append(
                (path, given if isinstance(given, Tensor) else None, first if isinstance(first, Tensor) else None)
            )  # fmt: skip

        return ended

    handles = [module.register_forward_hook(hook(path)) for path, module in block.named_modules() if path]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def is_added(block: nn.Module, path: str, call: BlockCall, hidden_BTH: Tensor) -> bool:
    """Whether what a module puts out is added to what the block puts out as it is: a shift of the one shifts the other."""
    plain = call.run(block, hidden_BTH).float()
    size = float(plain.abs().max())
    shift = size * torch.linspace(-1, 1, hidden_BTH.shape[-1], device=plain.device)

    def move(module: nn.Module, positional: tuple[Any, ...], output: Any) -> Any:
        return (output + shift).to(output.dtype) if isinstance(output, Tensor) else output

    handle = block.get_submodule(path).register_forward_hook(move)
    try:
        moved = call.run(block, hidden_BTH).float()
    finally:
        handle.remove()
    rounding = max(1e-4, 4 * torch.finfo(hidden_BTH.dtype).eps)
    return float((moved - plain - shift).abs().max()) <= rounding * size


def tied_blocks(model: nn.Module, blocks: nn.ModuleList) -> str | None:
    """Two places of a model that are one tensor, one of them in a block; None where there are none."""
    owners: dict[int, str] = {}
    inside = next(name for name, module in model.named_modules() if module is blocks)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(parameter), path)
        if other != path and any(name.startswith(f"{inside}.") for name in (path, other)):
            return f"{other} and {path}"
    return None
