"""Which layers are pruned: all, attention, MLP, or by name; in all blocks or some."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from reprune.errors import ConfigError, did_you_mean
from reprune.model.linears import LinearView

KINDS = ("all", "attention", "mlp")
# What mixes tokens is called attention in most architectures and mixer or convolution in the others.
_MIXES_TOKENS = re.compile(r"attention|attn|mixer|mamba|conv", re.IGNORECASE)
_BLOCKS = re.compile(r"all|(first|last):(\d+)|(\d*):(\d*)")


def mixes_tokens(block: nn.Module, view: LinearView) -> bool:
    """Whether a layer of a block belongs to its attention (or to what stands in its place), by name or class."""
    holder = view.parameter.rpartition(".")[0]
    parts = (holder if view.index is not None else holder.rpartition(".")[0]).split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    names = [*parts, *(type(block.get_submodule(path)).__name__ for path in paths if path)]
    return any(_MIXES_TOKENS.search(name) for name in names)


def targeted(blocks: Sequence[nn.Module], views: Sequence[dict[str, LinearView]], targets: str, which: str) -> list[str]:  # fmt: skip
    """The layers ('block.name') that are pruned, in the model's order.

    `targets`: 'all', 'attention', 'mlp', or names within the block with wildcards, several apart by spaces; `which`:
    'all', 'first:N', 'last:N', or 'A:B', blocks A to B−1 counted from 0. Raises ConfigError for what hits no layer.
    """
    chosen = blocks_chosen(len(blocks), which)
    patterns = targets.split()
    names = list(dict.fromkeys(name for own in views for name in own))
    for pattern in patterns if targets not in KINDS else ():
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(
                "targets",
                "no layer has such a name",
                value=pattern,
                accepted=[*KINDS, *_without_numbers(names)],
                hint=f"'{pattern}' stands alone: targets={pattern}"
                if pattern in KINDS
                else did_you_mean(pattern, [*KINDS, *names]),
            )
    found = []
    for index in chosen:
        for name in views[index]:
            if targets in {"attention", "mlp"}:
                hit = mixes_tokens(blocks[index], views[index][name]) == (targets == "attention")
            else:
                hit = targets == "all" or any(_matches(name, pattern) for pattern in patterns)
            if hit:
                found.append(f"{index}.{name}")
    if not found:
        raise ConfigError(
            "targets",
            f"no layer of the chosen blocks ({which}) belongs to it",
            value=targets or "''",
            accepted=[*KINDS, *_without_numbers(names)],
        )
    return found


def blocks_chosen(num_blocks: int, which: str) -> range:
    """The blocks that 'all', 'first:N', 'last:N' or 'A:B' stands for. ConfigError for anything else."""
    accepted = (
        f"all, first:N, last:N (N from 1 to {num_blocks}), A:B (blocks A to B−1, from 0; in YAML in quotes)"
    )
    match = _BLOCKS.fullmatch(which)
    if match is None:
        raise ConfigError("target_blocks", "not understood", value=which, accepted=accepted)
    end, number, start, stop = match.groups()
    chosen = range(num_blocks)
    if end is not None:
        count = int(number)
        chosen = range(count) if end == "first" else range(num_blocks - count, num_blocks)
    elif start is not None:
        chosen = range(int(start or 0), int(stop or num_blocks))
    if len(chosen) == 0 or chosen.start < 0 or chosen.stop > num_blocks:
        raise ConfigError(
            "target_blocks", f"the model has {num_blocks} blocks", value=which, accepted=accepted
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """A wildcard pattern for the whole name, or a plain word for its last part ('down_proj')."""
    return fnmatchcase(name, pattern) or name.split(".")[-1] == pattern or fnmatchcase(name, f"{pattern}.[0-9]*")  # fmt: skip


def _without_numbers(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
