"""Evaluate a model that is there, beside the dense one where it is named: one after the other, never two in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from reprune.calibration.source import TextSet
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.suite import (
    OUTCOME,
    DenseResult,
    Report,
    SuiteEntry,
    dense_result,
    dense_scratch,
    evaluate_pruned,
    evaluation_file,
    finished,
    write_result,
)
from reprune.model.checkpoint import ModelSource
from reprune.model.device import DevicePlan
from reprune.model.loading import LoadedModel, load_model


@dataclass(frozen=True)
class ModelEntry(SuiteEntry):
    """A suite entry whose file also depends on the model: outside a run's folder nothing else says which it was."""

    subject: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """See SuiteEntry; and model, dense model, dtype and device."""
        return {**super().identity, **self.subject}

    @property
    def plain(self) -> SuiteEntry:
        """The entry that the cache of dense results knows."""
        return SuiteEntry(self.name, self.evaluator, self.texts)


class _Loading:
    """An evaluator that gets its model when it is first needed: what the cache holds needs none."""

    def __init__(self, evaluator: Any, model: Callable[[], LoadedModel]) -> None:
        self._evaluator, self._model = evaluator, model

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """The evaluator's own."""
        identity: dict[str, Any] = self._evaluator.identity(texts)
        return identity

    def evaluate(self, task: Task) -> Outcome:
        """The evaluator's own, on the loaded model."""
        task = Task(self._model(), task.texts, task.folder, task.dense, task.on_progress)
        outcome: Outcome = self._evaluator.evaluate(task)
        return outcome

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """The evaluator's own."""
        texts: dict[str, TextSet] = self._evaluator.cut(tokenizer, key)
        return texts


class Waiting:
    """A model that is loaded when something of it is first missing; the results that an evaluator finds of it alone."""

    def __init__(self, source: ModelSource, tokenizer: Any, plan: DevicePlan) -> None:
        self._source, self._tokenizer, self._plan = source, tokenizer, plan
        self._loaded: list[LoadedModel] = []

    def model(self) -> LoadedModel:
        """The model, loaded now if it was not."""
        if not self._loaded:
            self._loaded.append(load_model(self._source, self._tokenizer, self._plan))
        return self._loaded[0]

    def result(self, entry: SuiteEntry, base: Path, report: Report) -> DenseResult:
        """What the evaluator finds of it, from the cache where it is there; see suite.dense_result."""
        # Its identity and plan are all that the cache asks for.
        source = self._source
        described = LoadedModel(
            source.name, None, self._tokenizer, nn.ModuleList(), self._plan, source.identity()
        )
        waiting = SuiteEntry(entry.name, _Loading(entry.evaluator, self.model), entry.texts)
        return dense_result(described, waiting, dense_scratch(base, entry), report)


def dense_results(
    source: ModelSource,
    tokenizer: Any,
    plan: DevicePlan,
    suite: Sequence[SuiteEntry],
    base: Path,
    report: Report,
) -> dict[str, DenseResult]:
    """What every evaluator finds of the dense model, by name; the model is loaded only if one is missing, then freed.

    Files of incomplete results go below `base`. RunError where nothing of an evaluator can be had.
    """
    waiting = Waiting(source, tokenizer, plan)
    return {entry.name: waiting.result(entry, base, report) for entry in suite}


def evaluate_alone(
    source: ModelSource,
    tokenizer: Any,
    plan: DevicePlan,
    suite: Sequence[ModelEntry],
    base: Path,
    report: Report,
) -> None:
    """Evaluate a model with nothing beside it, and write a file for each entry below `base`."""
    waiting = Waiting(source, tokenizer, plan)
    for entry in suite:
        if finished(base, entry):
            continue
        # To the cache it is a dense model like any other.
        result = waiting.result(entry.plain, base, report)
        partial = evaluation_file(base, entry).with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(result.folder, partial, ignore=shutil.ignore_patterns(OUTCOME, "key.json"))
        write_result(plan, entry, base, result.outcome, None)
        shutil.rmtree(dense_scratch(base, entry.plain), ignore_errors=True)


def evaluate_beside(
    sources: tuple[ModelSource, ModelSource],
    tokenizer: Any,
    plan: DevicePlan,
    suite: Sequence[ModelEntry],
    base: Path,
    report: Report,
) -> None:
    """Evaluate the dense model, the second of `sources`, free it, then the first; a file for each entry below `base`.

    Each file holds what was found of the dense model too, as `dense`; that is in the identity of its entry.
    """
    source, dense_source = sources
    plain = [entry.plain for entry in suite]
    dense = dense_results(dense_source, tokenizer, plan, plain, base, report)
    model = load_model(source, tokenizer, plan)
    for entry in suite:
        if not finished(base, entry):
            evaluate_pruned(model, entry, base, dense[entry.name], report)
        shutil.rmtree(dense_scratch(base, entry.plain), ignore_errors=True)
