"""The contract of a pruning method. Most methods are a ScorePruner: a score, and where it is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from reprune.engine.statistics import InputStatistics
from reprune.errors import ConfigError, RunError
from reprune.sparsity.patterns import Group, Pattern


@dataclass(frozen=True)
class Needs:
    """What a method reads of a layer, and whether it removes anything at all.

    `norm`: sums over its inputs (norms, means, variances); `gram`: Σ x xᵀ too. `gradients`: of the dense model's
    language-model loss, on the text of the mask data with the name `gradient_text` (None: on all of it).
    `block_gradients`: of the norm of the block's own output. `projected`: what each unit of a layer's inputs puts out.
    `statistics_without` names a text of the mask data of which no statistics are taken (None: they are of all of it).
    """

    norm: bool = False
    gram: bool = False
    gradients: bool = False
    gradient_text: str | None = None
    statistics_without: str | None = None
    block_gradients: bool = False
    projected: bool = False
    prunes: bool = True

    @property
    def any(self) -> bool:
        """Whether statistics of a layer's inputs are needed."""
        return self.norm or self.gram

    def __or__(self, other: Needs) -> Needs:
        assert None in (self.gradient_text, other.gradient_text)
        assert None in (self.statistics_without, other.statistics_without)
        return Needs(
            norm=self.norm or other.norm,
            gram=self.gram or other.gram,
            gradients=self.gradients or other.gradients,
            gradient_text=self.gradient_text or other.gradient_text,
            statistics_without=self.statistics_without or other.statistics_without,
            block_gradients=self.block_gradients or other.block_gradients,
            projected=self.projected or other.projected,
            prunes=self.prunes or other.prunes,
        )


@dataclass(frozen=True)
class GradientStatistics:
    """Of the gradient of a sequence's loss by a layer's weight, over sequences: float32 [d_out, d_in] each.

    `mean` is Σ_n g_n / N, the gradient of the mean loss; `mean_square` is Σ_n g_n² / N.
    """

    mean: Tensor
    mean_square: Tensor
    num_sequences: int

    def to(self, device: torch.device) -> GradientStatistics:
        """The same on another device."""
        return GradientStatistics(self.mean.to(device), self.mean_square.to(device), self.num_sequences)


@dataclass(frozen=True)
class LayerShape:
    """A layer before any weight is loaded: [d_out, d_in], whether it is stored transposed, and its checkpoint key.

    `key` is None where the layer is only a part of a parameter, so that its name in a checkpoint is not known.
    `expert`: a router decides which tokens come here.
    """

    shape: tuple[int, int]
    transposed: bool = False
    key: str | None = None
    expert: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """The shape as the model stores it."""
        d_out, d_in = self.shape
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    def orient(self, stored_or_view: Tensor) -> Tensor:
        """Turn a tensor between the stored layout and [d_out, d_in]; its own inverse."""
        return stored_or_view.T if self.transposed else stored_or_view


@dataclass(frozen=True)
class LayerContext:
    """A layer as a method sees it: weight [d_out, d_in] in the model's dtype, not to be changed in place.

    `removed`, bool [d_out, d_in], are weights that earlier rounds of a schedule removed and that must not return; None
    where there are none. They are to be removed before any other; `rank_first` gives them the lowest scores.
    """

    name: str
    block: int
    weight: Tensor
    statistics: InputStatistics | None
    generator: torch.Generator
    removed: Tensor | None = None
    gradients: GradientStatistics | None = None
    block_gradients: GradientStatistics | None = None

    @property
    def loss_gradients(self) -> GradientStatistics:
        """Gradients of the language-model loss, for methods that asked for them."""
        assert self.gradients is not None, f"{self.name}: the method did not ask for gradients"
        return self.gradients

    @property
    def regional_gradients(self) -> GradientStatistics:
        """Gradients of the norm of the block's output, for methods that asked for them."""
        assert self.block_gradients is not None, (
            f"{self.name}: the method did not ask for gradients of the block"
        )
        return self.block_gradients

    @property
    def inputs(self) -> InputStatistics:
        """The statistics, for methods that asked for them."""
        assert self.statistics is not None, f"{self.name}: the method did not ask for statistics"
        return self.statistics


@dataclass(frozen=True)
class Pruned:
    """New weight (dtype as given, zero where not kept), keep mask bool [d_out, d_in].

    `notes` are remarks that a person should see, `facts` what else goes into the record.
    """

    weight: Tensor
    keep: Tensor
    notes: Sequence[str] = ()
    facts: Mapping[str, int | float] = field(default_factory=dict)


class Pruner(Protocol):
    """One layer at a time: mask and weight."""

    needs: Needs

    def check(self, pattern: Pattern) -> None:
        """ConfigError for a pattern that the method cannot make, before anything is loaded."""
        ...

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """Sparsity of each of `layers` ('block.name') where the method has its masks already; None: it makes them.

        Called once, before the first `prune`. `layers` are those to prune, `known` all layers of the model. ConfigError
        where the masks do not fit them or the pattern. A method whose fields do not say what it will do to the numbers
        has an `identity()` too, asked for after this, which goes into the run's hash in place of its fields.
        """
        ...

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """Prune a layer to `sparsity` in `pattern`. RunError, naming the layer, when it cannot be done."""
        ...


class ScorePruner(ABC):
    """Keeps the weights with the highest scores and leaves their values."""

    needs: ClassVar[Needs] = Needs()
    within: ClassVar[Group] = Group.MATRIX

    @property
    def reorders(self) -> bool:
        """Whether a mask's groups of columns are others than consecutive ones, so that nothing may go on with it."""
        return False

    def check(self, pattern: Pattern) -> None:  # noqa: B027 (most methods have nothing to check)
        """Scores go with every pattern."""

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """None: the scores choose."""
        return None

    @abstractmethod
    def score(self, layer: LayerContext) -> Tensor:
        """Importance of every weight, float32 [d_out, d_in]; the lowest are removed."""

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        scores = self.score(layer)
        require_finite(scores, layer)
        keep = pattern.keep(rank_first(scores, layer.removed), sparsity, self.within)
        return Pruned(torch.where(keep, layer.weight, 0), keep)


class UnitPruner(ABC):
    """Ranks whole units of coupled layers (`pattern=structured`), and leaves the values of those that stay."""

    needs: ClassVar[Needs] = Needs(projected=True)

    def check(self, pattern: Pattern) -> None:
        """ConfigError for a pattern without units."""
        if not pattern.units:
            raise ConfigError(
                "pattern", "this pruner ranks whole heads and channels, not weights",
                value=type(pattern).__name__, accepted="structured", hint="pattern=structured",
            )  # fmt: skip

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """None: the scores choose."""
        return None

    @abstractmethod
    def unit_scores(self, consumer: LayerContext, columns: Tensor, projected: Tensor) -> Tensor:
        """Importance of every unit, float32 [units]; the lowest are removed.

        `consumer` is the layer that reads them, `columns` [units, features] are theirs of its weight, and `projected`
        [units] is the mean over tokens of ‖W_u x_u‖₁, of what each of them alone puts out.
        """

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """Never called: units are pruned, not layers."""
        raise AssertionError("units are of several layers")


def rank_first(scores: Tensor, removed: Tensor | None) -> Tensor:
    """Scores in which what is removed already is lower than anything else."""
    return scores if removed is None else scores.masked_fill(removed, -torch.inf)


def require_finite(scores: Tensor, layer: LayerContext) -> None:
    """Raise RunError when a score is NaN or infinite: no mask can be chosen from it."""
    # NaN is both the least and the greatest of all, and no mask as large as the scores is made.
    if scores.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(scores)):
        raise RunError(
            f"block {layer.block}, layer {layer.name}: scores are not finite; the weights or the calibration "
            "activations overflow, try dtype=float32"
        )
