"""The contract of evaluators: text first, checked before weights are loaded; then flat metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from reprune.calibration.source import TextSet
from reprune.model.loading import LoadedModel

OnProgress = Callable[[int, int], None]


class Evaluator(Protocol):
    """One entry of an evaluation suite."""

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """The texts it will use, by name. ConfigError below `key` for texts that are missing or too short."""
        ...

    def identity(self, texts: dict[str, TextSet]) -> dict[str, Any]:
        """What changes its numbers, texts by content."""
        ...

    def evaluate(
        self, model: LoadedModel, texts: dict[str, TextSet], on_progress: OnProgress
    ) -> dict[str, float]:
        """Flat metrics of a model, names like 'perplexity/web'."""
        ...
