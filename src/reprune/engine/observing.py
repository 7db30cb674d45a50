"""Statistics of a block's layers over texts: of their inputs, and of those in two chains side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reprune.calibration.source import TextSet
from reprune.engine.chains import Boundary, Chains
from reprune.engine.collecting import collecting
from reprune.engine.statistics import InputStatistics
from reprune.errors import RunError
from reprune.model.coupling import Coupling
from reprune.model.description import hidden_size_of
from reprune.model.linears import LinearView
from reprune.reconstruction.pairs import PairStatistics

Views = Mapping[str, LinearView]
_TRACED_TOKENS = 4


def collect(
    chains: Chains, block: int, inputs: Boundary, texts: Sequence[TextSet], views: Views, with_gram: bool
) -> dict[str, InputStatistics]:
    """Input statistics of some layers of a block, whose weights are as they are now. RunError for a layer not called."""
    with chains.model.holding(chains.model.blocks[block]):
        last = _last_called(chains, block, views)
        with collecting(views, with_gram, chains.ranks) as found:
            chains.observe(block, inputs, texts, last=last)
    missed = [name for name in views if name not in found]
    if missed:
        raise RunError(
            f"block {block}, layer {missed[0]}: it was not called in the forward pass, so it has no statistics"
        )
    return found


@torch.no_grad()
def _last_called(chains: Chains, block: int, views: Views) -> nn.Module | None:
    """The layer behind which no other of `views` is called; None where each pass may call others, or one more than once."""
    model = chains.model
    if any(view.is_expert for view in views.values()):
        return None
    called: list[nn.Module] = []
    handles = [
        view.module.register_forward_pre_hook(lambda module, _: called.append(module))
        for view in views.values()
    ]
    try:
        # Any states will do: only what is called is looked at.
        hidden = torch.zeros(1, _TRACED_TOKENS, hidden_size_of(model.model), dtype=model.plan.dtype)
        call = model.call(block, 1, _TRACED_TOKENS)
        call.run(model.blocks[block], hidden.to(model.plan.device))
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if len(called) == len(views) == len(set(called)) else None


def collect_projected(
    chains: Chains, block: int, inputs: Boundary, texts: Sequence[TextSet], couplings: Sequence[Coupling]
) -> dict[str, Tensor]:
    """By consumer the means over tokens of ‖W_u x_u‖₁ for units u of its inputs: float32 [units] each."""
    views = chains.model.linears[block]
    sums = {it.consumer: torch.zeros(len(it.columns), device=it.columns.device) for it in couplings}
    num_tokens = sum(text.tokens_NT.numel() for text in texts)

    def adding(weight: Tensor, columns: Tensor, total: Tensor) -> Any:
        @torch.no_grad()
        def add(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = positional[0] if positional else next(iter(keywords.values()))
            x = given.reshape(-1, given.shape[-1]).float()
            if columns.shape[1] == 1:
                total.add_((x.abs().sum(dim=0) * weight.abs().sum(dim=0))[columns[:, 0]])
                return
            for unit, own in enumerate(columns):
                total[unit] += (x[:, own] @ weight[:, own].T).abs().sum()

        return add

    with chains.model.holding(chains.model.blocks[block]):
        handles = [
            views[it.consumer].module.register_forward_pre_hook(
                adding(views[it.consumer].weight.float(), it.columns, sums[it.consumer]), with_kwargs=True
            )
            for it in couplings
        ]
        try:
            chains.observe(block, inputs, texts)
        finally:
            for handle in handles:
                handle.remove()
    chains.ranks.sum_(sums.values())
    return {name: total / num_tokens for name, total in sums.items()}


def collect_pairs(
    chains: Chains,
    block: int,
    students: Boundary,
    teachers: Boundary,
    dense_weights: Mapping[str, Tensor],
    texts: Sequence[TextSet],
    views: Views,
) -> dict[str, PairStatistics]:
    """Σ x̂ xᵀ of some layers: x̂ in the block as it is on `students`, x in the block with `dense_weights` on `teachers`."""
    model, plan = chains.model, chains.model.plan
    module = model.blocks[block]
    found = {name: PairStatistics() for name in views}
    dense = {name: tensor.to(plan.device) for name, tensor in dense_weights.items()}
    for text in texts:
        student, teacher = students[text.key], teachers[text.key]
        for where in chains.batches(student):
            hidden = student.read(where, plan)
            call = model.call(block, len(hidden), student.length, student.positions(where))
            with _watching(views) as pruned_inputs:
                call.run(module, hidden)
            with _watching(views) as dense_inputs:
                call.run(module, teacher.read(where, plan), weights=dense)
            for name, pair in found.items():
                pair.add(pruned_inputs[name], dense_inputs[name])
    if chains.ranks.several:
        for name, pair in found.items():
            pair.sum_over(chains.ranks, views[name].shape[1], plan.device)
    return found


@contextmanager
def _watching(views: Views) -> Iterator[dict[str, Tensor]]:
    """What each layer was given in the one forward pass of the context."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen[name] = positional[0] if positional else next(iter(keywords.values()))

        return keep

    handles = [
        view.module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, view in views.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
