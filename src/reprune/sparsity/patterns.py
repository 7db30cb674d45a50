"""Patterns: which weights of a comparison group are kept, by an exact count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import floor
from typing import Protocol

import torch
from torch import Tensor

from reprune.errors import ConfigError, require_positive
from reprune.model.device import kth_lowest


class Group(Enum):
    """What a weight is compared with: its output row, or the whole matrix."""

    ROW = "row"
    MATRIX = "matrix"


class Pattern(Protocol):
    """From scores to a keep mask."""

    @property
    def columns(self) -> int | None:
        """How many consecutive inputs are decided together; None where any choice is allowed."""
        ...

    @property
    def varies(self) -> bool:
        """Whether layers may have sparsities of their own."""
        ...

    @property
    def units(self) -> bool:
        """Whether weights of several layers go together, so that only scores of all of them give a mask."""
        ...

    def resolve(self, sparsity: float | None) -> float:
        """The sparsity to use for the one the user gave; ConfigError where they do not go together."""
        ...

    def settle(self, shares: Mapping[str, float], num_weights: Mapping[str, int]) -> dict[str, float]:
        """The sparsities by layer ('block.name') that the pattern can hold and that come nearest to `shares`.

        Their mean weighted by `num_weights` is that of `shares`, as near as whole counts come to it.
        """
        ...

    def check_shape(self, layer: str, shape: tuple[int, int]) -> None:
        """ConfigError for a layer [d_out, d_in] that cannot hold the pattern."""
        ...

    def check_steps(self, steps: Sequence[float]) -> None:
        """ConfigError for sparsities of a schedule's rounds that the pattern cannot take one after the other."""
        ...

    def keep(self, scores: Tensor, sparsity: float, within: Group) -> Tensor:
        """Bool mask like `scores` [d_out, d_in], True where the weight stays."""
        ...


def count_removed(size: int, sparsity: float) -> int:
    """Round-half-up of size × sparsity: how many of a group of `size` are removed."""
    return floor(size * sparsity + 0.5)


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """Mask of each row of `scores` [rows, n] without its `removed` lowest; among equals the first go.

    The count is exact whatever ties there are, which a threshold alone does not give.
    """
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if removed == scores.shape[1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_lowest(scores, removed)
    lowest = scores <= threshold
    if int(torch.count_nonzero(lowest)) == removed * len(scores):
        return ~lowest
    below = scores < threshold
    equal = scores == threshold
    still = removed - below.sum(dim=1, keepdim=True)
    drop = below | (equal & (equal.cumsum(dim=1) <= still))
    return ~drop


class AnyCount:
    """What patterns have in common that can hold every sparsity in every layer, in any number of rounds."""

    @property
    def columns(self) -> int | None:
        """None: no grid."""
        return None

    @property
    def varies(self) -> bool:
        """Every layer may have its own."""
        return True

    def settle(self, shares: Mapping[str, float], num_weights: Mapping[str, int]) -> dict[str, float]:
        """The shares as they are."""
        return dict(shares)

    def resolve(self, sparsity: float | None) -> float:
        """0.5 where none is given; must lie in [0, 1)."""
        if sparsity is None:
            return 0.5
        if not 0 <= sparsity < 1:
            raise ConfigError("sparsity", "outside its range", value=sparsity, accepted="0 ≤ sparsity < 1")
        return sparsity

    def check_shape(self, layer: str, shape: tuple[int, int]) -> None:
        """Every shape will do."""

    def check_steps(self, steps: Sequence[float]) -> None:
        """Every number of rounds will do."""


@dataclass(kw_only=True)
class Unstructured(AnyCount):
    """Any weight may go; round-half-up(n · sparsity) of each comparison group of n do."""

    @property
    def units(self) -> bool:
        """Each layer by itself."""
        return False

    def keep(self, scores: Tensor, sparsity: float, within: Group) -> Tensor:
        """See Pattern."""
        rows = scores.reshape(1, -1) if within is Group.MATRIX else scores
        return keep_highest(rows, count_removed(rows.shape[1], sparsity)).reshape(scores.shape)


@dataclass(kw_only=True)
class KeptOfGroup:
    """N:M as kept:group: of every `group` consecutive inputs of an output, `kept` stay (2:4 keeps 2 of 4)."""

    kept: int
    group: int

    def __post_init__(self) -> None:
        require_positive(kept=self.kept, group=self.group)
        if self.kept > self.group:
            raise ConfigError(
                "kept",
                "more weights are kept than a group has",
                value=f"kept={self.kept}, group={self.group}",
                accepted="kept ≤ group",
                hint="N:M is kept:group here, so 2:4 is kept=2 group=4",
            )

    @property
    def columns(self) -> int | None:
        """The group."""
        return self.group

    @property
    def varies(self) -> bool:
        """One for all."""
        return False

    @property
    def units(self) -> bool:
        """Each layer by itself."""
        return False

    def settle(self, shares: Mapping[str, float], num_weights: Mapping[str, int]) -> dict[str, float]:
        """The shares as they are: all are the same."""
        return dict(shares)

    def resolve(self, sparsity: float | None) -> float:
        """1 − kept/group; another sparsity is an error."""
        implied = 1 - self.kept / self.group
        if sparsity is not None and abs(sparsity - implied) > 1e-9:
            raise ConfigError(
                "sparsity",
                f"{self.kept}:{self.group} implies another sparsity",
                value=sparsity,
                accepted=f"{implied:g}, or null",
            )
        return implied

    def check_shape(self, layer: str, shape: tuple[int, int]) -> None:
        """The inputs must divide into groups."""
        if shape[1] % self.group:
            raise ConfigError(
                "pattern.group",
                f"{layer} has {shape[1]} inputs, which do not divide into groups of {self.group}",
                value=self.group,
                accepted=f"a divisor of {shape[1]}",
            )

    def check_steps(self, steps: Sequence[float]) -> None:
        """Every round must remove at least one weight more of a group, the last group − kept in all."""
        counts = [count_removed(self.group, step) for step in steps]
        if counts[-1] != self.group - self.kept or any(b <= a for a, b in zip([0, *counts], counts, strict=False)):  # fmt: skip
            raise ConfigError(
                "schedule",
                f"its rounds remove {', '.join(map(str, counts))} weights of a group: {self.kept}:{self.group} "
                "has to remove more in every round",
                value=", ".join(f"{step:.3g}" for step in steps),
                accepted=f"at most {self.group - self.kept} rounds, with steps of their own",
                hint=f"schedule.shape=linear schedule.rounds={self.group - self.kept}, or schedule=one_shot",
            )

    def keep(self, scores: Tensor, sparsity: float, within: Group) -> Tensor:
        """See Pattern; `within` does not matter, the group decides; `sparsity` is met to a whole weight of a group."""
        grouped = scores.reshape(-1, self.group)
        return keep_highest(grouped, count_removed(self.group, sparsity)).reshape(scores.shape)
