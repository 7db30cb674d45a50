"""The contract of a transform: another model made of the dense one, before anything is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import nn

from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.engine.activations import Stores
from reprune.evaluation.suite import SuiteEntry
from reprune.model.checkpoint import ModelSource
from reprune.model.loading import LoadedModel

RECORD = "transform.json"
"""In the run folder: what a transform did, from which a run that goes on does the same again."""

Wanted = Literal["evaluation", "export"]


@dataclass(frozen=True)
class Surroundings:
    """What a transform may read: the run's texts, those of its evaluators that are known, where the model is from.

    `folder` is the run's; what is kept there is found again by a run that goes on.
    """

    source: ModelSource
    texts: Texts
    evaluated: Sequence[TextSet]
    stores: Stores
    folder: Path


class Transform(Protocol):
    """A run measures the dense model, then transforms it; pruning and reconstruction see the transformed model only.

    From then on it is the dense model: the dense chain, targets, statistics and allocations are its own. Evaluations
    are held against the model as it was before.
    """

    renumbers: ClassVar[bool]
    """Whether blocks get other numbers, so that masks of the dense model do not fit."""

    keeps_rows: ClassVar[bool]
    """Whether tensors from outside the blocks are written to the run folder."""

    def identity_beside(self, suite: Sequence[SuiteEntry]) -> dict[str, Any]:
        """What of the evaluators changes a number of the run, beside its own choices; ConfigError for one it bars."""
        ...

    def outline(self, source: ModelSource, model: Any, blocks: nn.ModuleList) -> None:
        """Make the dense model's skeleton (meta device) that of the transformed one, in place.

        ConfigError, without the group's name in its key, where it cannot be done.
        """
        ...

    def apply(self, model: LoadedModel, around: Surroundings) -> LoadedModel:
        """The transformed model; the one that is given is used up. Writes RECORD, or does what it says if it is there.

        RunError or ConfigError where it cannot be done.
        """
        ...

    def made_for(self, wanted: Wanted, model: LoadedModel, folder: Path) -> LoadedModel:
        """The transformed model, pruned by now, as it is to be evaluated or exported; evaluation comes first.

        `folder` is the run's.
        """
        ...

    def reopened(self, model: LoadedModel, folder: Path) -> LoadedModel:
        """What the run exported, as the run evaluated it."""
        ...


@dataclass(kw_only=True)
class Untransformed:
    """The model as it is: `transform=none`, for grids; the same run as one without `transform`."""

    renumbers: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = False

    def identity_beside(self, suite: Sequence[SuiteEntry]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def outline(self, source: ModelSource, model: Any, blocks: nn.ModuleList) -> None:
        """Nothing changes."""

    def apply(self, model: LoadedModel, around: Surroundings) -> LoadedModel:
        """The model itself; there is no RECORD."""
        return model

    def made_for(self, wanted: Wanted, model: LoadedModel, folder: Path) -> LoadedModel:
        """The model itself."""
        return model

    def reopened(self, model: LoadedModel, folder: Path) -> LoadedModel:
        """The model itself."""
        return model
