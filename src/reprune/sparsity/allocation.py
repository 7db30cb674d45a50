"""The contract of allocations: how the sparsity is spread over layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from reprune.model.coupling import Coupling
from reprune.pruning.contract import LayerContext, Pruner
from reprune.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Layers:
    """What is known of the layers to prune ('block.name') before any weight is loaded: (d_out, d_in) of each."""

    shapes: Mapping[str, tuple[int, int]]

    @property
    def num_weights(self) -> dict[str, int]:
        """Weights by layer."""
        return {name: d_out * d_in for name, (d_out, d_in) in self.shapes.items()}

    @property
    def blocks(self) -> dict[str, int]:
        """The block of each layer."""
        return {name: int(name.partition(".")[0]) for name in self.shapes}

    def by_block(self, of_block: Mapping[int, float]) -> dict[str, float]:
        """A value of every block as one of each of its layers."""
        return {name: of_block[block] for name, block in self.blocks.items()}


@dataclass(frozen=True)
class Wanted:
    """What a run asks of an allocation: for which layers, pruner, pattern and rounds, and which validation texts it has."""

    layers: Layers
    pruner: Pruner
    pattern: Pattern
    sparsities: Sequence[float]
    validation: Sequence[str]


class DenseBlock(Protocol):
    """A block of the dense model, for as long as it is visited."""

    @property
    def index(self) -> int:
        """Which."""
        ...

    @property
    def layers(self) -> Mapping[str, LayerContext]:
        """Its layers to prune by full name ('block.name'): weights, and statistics of the mask data in the dense chain."""
        ...

    @property
    def couplings(self) -> Sequence[Coupling]:
        """Its units of coupled layers, of those to prune (`model.coupling`)."""
        ...

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What enters and what leaves it, float32 [tokens, hidden] each, a sequence of the mask data at a time."""
        ...

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Per-token relative error of its output on the validation text with these weights, [d_out, d_in] by full name."""
        ...


class ModelView(Protocol):
    """A dense model, visited block by block."""

    @property
    def layers(self) -> Layers:
        """The layers to prune."""
        ...

    @property
    def pruner(self) -> Pruner:
        """The run's pruner."""
        ...

    @property
    def pattern(self) -> Pattern:
        """The run's pattern."""
        ...

    def visit(
        self, *, norm: bool = False, gram: bool = False, text: bool = True, without: str | None = None
    ) -> Iterator[DenseBlock]:
        """Each block in turn, with the statistics asked for; whatever is read of it has to be read in its turn.

        Statistics are of the mask data but for its text of the name `without`. Without `text` nothing is computed, and
        there are weights only.
        """
        ...


class Allocation(Protocol):
    """From a model's layers to a sparsity for each: one of `SizeAllocation` and `ModelAllocation`."""

    def check(self, wanted: Wanted) -> None:
        """ConfigError for what it cannot do, before anything is loaded."""
        ...


class SizeAllocation:
    """An allocation that reads nothing but the sizes of layers, so that it is known before anything is loaded."""

    reads_model: ClassVar[bool] = False

    def check(self, wanted: Wanted) -> None:
        """Any will do."""

    def allocate(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """Sparsity by layer in [0, 1); the mean weighted by the number of weights is `sparsity`, up to rounding."""
        raise NotImplementedError


class ModelAllocation:
    """An allocation that reads the dense model's weights or activations."""

    reads_model: ClassVar[bool] = True

    def check(self, wanted: Wanted) -> None:
        """Any will do."""

    def allocate_for(self, view: ModelView, sparsities: Sequence[float]) -> list[dict[str, float]]:
        """For each of `sparsities`, the rounds of a schedule, what SizeAllocation.allocate gives; visits as often as it likes."""
        raise NotImplementedError
