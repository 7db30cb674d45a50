"""The contract of evaluators: text first, checked before weights are loaded; then flat metrics and files beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from reprune.calibration.source import TextSet
from reprune.model.loading import LoadedModel

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """One model to evaluate: the texts that the evaluator cut, and where its files lie.

    `folder` is there for what the evaluator keeps beside its metrics (a row an example or a window), empty but for what
    the same evaluation had written when it was interrupted, which it may take over; `dense` is
    the folder that the same evaluator filled for the dense model, None where the model is the dense one. Never are two
    models in memory: what a comparison needs of the dense one has to be in its folder.
    """

    model: LoadedModel
    texts: Mapping[str, TextSet]
    folder: Path
    dense: Path | None
    on_progress: OnProgress


@dataclass(frozen=True)
class Outcome:
    """Flat metrics, names like 'perplexity/web'; parts that failed with what they failed of; remarks for the record.

    A part that failed has no metrics: missing is missing.
    """

    metrics: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Evaluator(Protocol):
    """One entry of an evaluation suite.

    It may say `needs_dense: ClassVar[bool] = True` where it can only compare with the dense model, and have
    `check_room(max_length, key)`, which raises ConfigError for what does not fit the model's context beside its texts.
    One whose text is not all among those that `cut` returns has `asked`, examples by task, for the plan of a run.
    """

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """The texts it will use, by name. ConfigError below `key` for texts that are missing or too short."""
        ...

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """What changes its numbers, texts by content."""
        ...

    def evaluate(self, task: Task) -> Outcome:
        """Evaluate a model; RunError where nothing of it can be."""
        ...
