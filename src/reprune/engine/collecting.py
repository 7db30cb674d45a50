"""Who sees which inputs: one accumulator for all layers that are given the same, one for each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reprune.engine.statistics import InputStatistics
from reprune.errors import RunError
from reprune.model.experts import fused_names, intermediate, routed
from reprune.model.linears import LinearView
from reprune.ranks import ALONE, Ranks, groups_of


@contextmanager
def collecting(
    linears: Mapping[str, LinearView], with_gram: bool, ranks: Ranks = ALONE
) -> Iterator[dict[str, InputStatistics]]:
    """Accumulate the input statistics of `linears` over all forward passes in the context, in the order of calls.

    At its end they are those of the passes of all processes in `ranks`.

    Layers that were given the very same tensor in the first pass (q, k and v; gate and up) share one accumulator.
    An expert's are of the tokens routed to it; at the end of the context an expert that had its chance and got none
    has those of `InputStatistics.of_no_token`. Other layers that were not called have no entry.
    """
    collector = _Collector(with_gram)
    fused: dict[nn.Module, dict[str, LinearView]] = {}
    handles = []
    for name, view in linears.items():
        if view.index is None:
            hook = collector.hook(name)
            handles.append(view.module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            fused.setdefault(view.module, {})[name] = view
    for module, views in fused.items():
        hook = collector.hook_of_experts(views)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    routing = {view.mixture.called for view in linears.values() if view.mixture is not None}
    handles += [module.register_forward_pre_hook(collector.note_call) for module in routing]
    try:
        yield collector.found
        if ranks.several:
            collector.sum_over(ranks, linears)
        collector.fill_in_starved(linears)
    finally:
        for handle in handles:
            handle.remove()


class _Collector:
    def __init__(self, with_gram: bool) -> None:
        self.with_gram = with_gram
        self.found: dict[str, InputStatistics] = {}
        self.leaders: set[str] = set()
        self.called: set[nn.Module] = set()
        # Held until the layer is met again, that is for the first pass, so that no address is used twice in it.
        # The version tells a tensor from the same one after it was changed in place.
        self.first_inputs: list[tuple[Tensor, int, str]] = []

    def hook(self, name: str) -> Any:
        def observe(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs = positional[0] if positional else next(iter(keywords.values()))
            # An expert may be called with no token, and all such inputs lie at one address.
            if inputs.numel() == 0:
                return
            if name in self.found:
                self.first_inputs.clear()
            else:
                self._meet(name, inputs)
            if name in self.leaders:
                self.found[name].add(inputs, self.with_gram)

        return observe

    def hook_of_experts(self, views: Mapping[str, LinearView]) -> Any:
        """For fused experts: `views` are the ones that are wanted, of one module."""
        wanted = {(view.parameter.rpartition(".")[2], view.index): name for name, view in views.items()}

        @torch.no_grad()
        def observe(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            for name in views:
                self.found.setdefault(name, InputStatistics())
            up, down = fused_names(module)
            for expert, inputs in routed(module, positional, keywords):
                if (up, expert) in wanted:
                    self.found[wanted[up, expert]].add(inputs, self.with_gram)
                if (down, expert) in wanted:
                    within = intermediate(module, expert, inputs)
                    self.found[wanted[down, expert]].add(within, self.with_gram)

        return observe

    def note_call(self, module: nn.Module, positional: tuple[Any, ...]) -> None:
        self.called.add(module)

    def sum_over(self, ranks: Ranks, linears: Mapping[str, LinearView]) -> None:
        """What any process met, all of them have met."""
        leaders: dict[int, str] = {}
        mixtures = {name: view.mixture.called for name, view in linears.items() if view.mixture is not None}
        told = ranks.gathered(
            {
                "leaders": {name: leaders.setdefault(id(own), name) for name, own in self.found.items()},
                "tokens": {name: own.num_tokens for name, own in self.found.items()},
                "called": [name for name, module in mixtures.items() if module in self.called],
            }
        )
        self.called |= {mixtures[name] for one in told for name in one["called"]}
        groups = groups_of([one["leaders"] for one in told])
        together: dict[str, InputStatistics] = {}
        summed: set[int] = set()
        for group in groups:
            first = group[0]
            own = self.found.get(first, InputStatistics())
            if id(own) in summed:
                raise RunError(f"layer {first}: processes disagree on which layers share an input")
            summed.add(id(own))
            num_tokens = sum(one["tokens"].get(first, 0) for one in told)
            if num_tokens:
                view = linears[first]
                own.sum_over(ranks, num_tokens, view.shape[1], view.stored.device, self.with_gram)
            together |= dict.fromkeys(group, own)
        self.found.clear()
        self.found |= {name: together[name] for one in told for name in one["leaders"]}

    def fill_in_starved(self, linears: Mapping[str, LinearView]) -> None:
        for name, view in linears.items():
            seen = name in self.found and self.found[name].num_tokens > 0
            if not seen and view.mixture is not None and view.mixture.called in self.called:
                device = view.stored.device
                self.found[name] = InputStatistics.of_no_token(view.shape[1], device, self.with_gram)

    def _meet(self, name: str, inputs: Tensor) -> None:
        for seen, version, leader in self.first_inputs:
            same_memory = seen.data_ptr() == inputs.data_ptr() and seen.shape == inputs.shape
            if same_memory and version == inputs._version:
                self.found[name] = self.found[leader]
                return
        self.first_inputs.append((inputs, inputs._version, name))
        self.leaders.add(name)
        self.found[name] = InputStatistics()
