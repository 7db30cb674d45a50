"""Mixtures of experts: experts fused into parameters of three dimensions, experts in a list, and their routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

INTERFACE = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


@dataclass(frozen=True)
class Mixture:
    """Experts of a block: their path in it, the module whose call gives each its chance, the routers' paths."""

    path: str
    called: nn.Module
    routers: frozenset[str]


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds its experts as transformers' `use_experts_implementation` asks for it."""
    return all(hasattr(module, name) for name in INTERFACE) and all(
        isinstance(weight := getattr(module, name, None), nn.Parameter)
        and weight.dim() == 3
        and len(weight) == module.num_experts
        for name in fused_names(module)
    )


def fused_names(experts: Any) -> tuple[str, str]:
    """The parameters of fused experts: what the tokens enter (gate and up in one, or up alone), and down."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def mixtures_of(block: nn.Module) -> list[Mixture]:
    """The mixtures of experts in a block. A list of modules is one if a router for that many lies beside it."""
    found = []
    for path, module in block.named_modules():
        listed = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if not listed and not is_fused(module):
            continue
        holder_path, _, own = path.rpartition(".")
        holder = block.get_submodule(holder_path)
        num_experts: Any = (
            len(module) if isinstance(module, nn.ModuleList | nn.ModuleDict) else module.num_experts
        )
        beside = {name: child for name, child in holder.named_children() if name != own}
        routers = {name for name, child in beside.items() if _routes(child, num_experts)}
        if listed and not any(num_experts in _widths(beside[name]) for name in routers):
            continue
        paths = frozenset(f"{holder_path}.{name}".removeprefix(".") for name in routers)
        found.append(Mixture(path, holder if listed else module, paths))
    return found


def _routes(child: nn.Module, num_experts: int) -> bool:
    """Whether a module beside the experts chooses or weighs them.

    The width alone does not tell: with 512 experts, a shared expert may be 512 wide. It gives back what it takes.
    """
    linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
    if len(linears) > 1 and linears[0].in_features in {linear.out_features for linear in linears}:
        return False
    # Some have classes beside the experts, such as none at all, so that only their attributes tell.
    says_so = hasattr(child, "top_k") or hasattr(child, "num_experts")
    return says_so or bool(_widths(child) & {1, num_experts})


def _widths(module: nn.Module) -> set[int]:
    return {len(weight) for weight in module.parameters() if weight.dim() == 2}


def stacked(block: nn.Module) -> Iterator[str]:
    """Paths of parameters of two dimensions that hold all experts one below the other: no view reaches them."""
    counts = {path: getattr(module, "num_experts", None) for path, module in block.named_modules()}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or is_fused(module):
            continue
        around = [count for own, count in counts.items() if own == path or path.startswith(f"{own}.")]
        for name, weight in module.named_parameters(recurse=False):
            rows = len(weight) if weight.dim() == 2 else 0
            if any(isinstance(count, int) and rows > count > 1 and rows % count == 0 for count in around):
                yield f"{path}.{name}"


def routed(
    experts: Any, positional: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """From the arguments of a call of fused experts: each expert that got tokens, and its inputs [tokens, d_in].

    A token that was sent to an expert twice is there twice. Indices that name no expert are dropped tokens.
    """
    hidden = positional[0] if positional else keywords["hidden_states"]
    # Architectures have several names for it, but nothing else in the call is made of integers.
    index = next(
        value
        for value in (*positional, *keywords.values())
        if isinstance(value, Tensor) and not value.is_floating_point()
    )
    hidden, index = hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])
    for expert in range(experts.num_experts):
        tokens, _ = torch.where(index == expert)
        if len(tokens):
            yield expert, hidden[tokens]


def intermediate(experts: Any, expert: int, inputs: Tensor) -> Tensor:
    """What an expert's down projection is given for its inputs [tokens, d_in]: [tokens, d_intermediate]."""
    up, _ = fused_names(experts)
    weight = getattr(experts, up)[expert]
    bias = getattr(experts, f"{up}_bias")[expert] if experts.has_bias else None
    # A norm may hand on float32, which transformers casts here too.
    projected = functional.linear(
        inputs.to(weight.dtype), weight.T if experts.is_transposed else weight, bias
    )
    found = experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)
    assert isinstance(found, Tensor)
    return found
