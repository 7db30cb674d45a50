"""Run a suite of evaluators and keep each result as a file of its own; dense results come from the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from reprune import RESULTS_VERSION
from reprune.cache import cached_folder
from reprune.calibration.source import TextSet
from reprune.errors import ConfigError, RunError
from reprune.evaluation.contract import Evaluator, OnProgress, Outcome, Task
from reprune.files import read_json, sha256_of_json, write_json
from reprune.model.loading import LoadedModel

LIBRARIES = [torch.__version__, transformers.__version__]
"""Part of a cache key: another version may give other last digits, or other kernels."""

OUTCOME = "outcome.json"
Report = Callable[[str], OnProgress]


@dataclass(frozen=True)
class SuiteEntry:
    """A named evaluator with its texts."""

    name: str
    evaluator: Evaluator
    texts: dict[str, TextSet]

    @property
    def identity(self) -> dict[str, Any]:
        """What changes its numbers, but for the model."""
        return {"results_version": RESULTS_VERSION, **self.evaluator.identity(self.texts)}

    @property
    def hash(self) -> str:
        """Names its result file."""
        return sha256_of_json(self.identity)[:16]


@dataclass(frozen=True)
class DenseResult:
    """What an evaluator found of the dense model, and the folder with its files."""

    outcome: Outcome
    folder: Path


def dense_result(model: LoadedModel, entry: SuiteEntry, scratch: Path, report: Report) -> DenseResult:
    """The dense model's result: computed once for model, evaluator, dtype and device, then read from the cache.

    A result of which parts failed is not kept in the cache but in `scratch`, and is tried again by the next run.
    """
    key = {
        **entry.identity,
        "model": model.identity,
        "dtype": str(model.plan.dtype),
        "device": model.plan.kind,
        "threads": model.plan.num_threads,
        "made_with": LIBRARIES,
    }

    def write(folder: Path) -> None:
        outcome = entry.evaluator.evaluate(
            Task(model, entry.texts, folder, None, report(f"dense {entry.name}"))
        )
        write_json(folder / OUTCOME, asdict(outcome))
        if outcome.failed:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(folder, scratch)
            raise _IncompleteError

    try:
        folder = cached_folder("dense_results", key, write)
    except _IncompleteError:
        folder = scratch
    return DenseResult(Outcome(**read_json(folder / OUTCOME)), folder)


class _IncompleteError(Exception):
    """Keeps a result of which parts failed out of the cache."""


def check_evaluation_room(suite: Sequence[SuiteEntry], max_length: int | None) -> None:
    """ConfigError for texts, and whatever else an evaluator puts into a row, that the model's context does not hold."""
    if max_length is None:
        return
    for entry in suite:
        key = f"evaluation.{entry.name}"
        longest = max((text.tokens_NT.shape[1] for text in entry.texts.values()), default=0)
        if longest > max_length:
            raise ConfigError(
                f"{key}.length", "longer than the model's context", value=longest, accepted=f"at most {max_length}"
            )  # fmt: skip
        if hasattr(entry.evaluator, "check_room"):
            entry.evaluator.check_room(max_length, key)


def evaluation_file(folder: Path, entry: SuiteEntry) -> Path:
    """Where a run keeps the result of an evaluator; the evaluator's own files lie in a folder of the same name."""
    return folder / "evaluations" / f"{entry.hash}.json"


def evaluate_pruned(
    model: LoadedModel, entry: SuiteEntry, folder: Path, dense: DenseResult, report: Report
) -> None:
    """Evaluate the pruned model and write the result file; a failure is recorded as failed, never as a number."""
    file = evaluation_file(folder, entry)
    files, partial = file.with_suffix(""), file.with_suffix(".part")
    for left in (files, partial):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    task = Task(model, entry.texts, partial, dense.folder, report(f"pruned {entry.name}"))
    try:
        outcome = entry.evaluator.evaluate(task)
    except RunError as error:
        outcome = Outcome({}, {entry.name: str(error)})
    if any(partial.iterdir()):
        partial.rename(files)
    else:
        partial.rmdir()
    content = {
        "name": entry.name,
        "identity": entry.identity,
        "status": "failed" if outcome.failed else "finished",
        **asdict(outcome),
    }
    write_json(file, content)


def finished(folder: Path, entry: SuiteEntry) -> bool:
    """Whether the run has this result already."""
    path = evaluation_file(folder, entry)
    return path.is_file() and read_json(path)["status"] == "finished"


def metrics_of(folder: Path, suite: Sequence[SuiteEntry]) -> tuple[dict[str, float], dict[str, str]]:
    """All pruned metrics of a run under 'eval/pruned/…', and what failed of `suite` by part.

    Where an earlier evaluation has the same metric, that of `suite` counts; where that one failed, none does.
    """
    current = {evaluation_file(folder, entry): entry.name for entry in suite}
    earlier = [path for path in sorted((folder / "evaluations").glob("*.json")) if path not in current]
    metrics: dict[str, float] = {}
    failed: dict[str, str] = {}
    broken = {
        name for path, name in current.items() if path.is_file() and read_json(path)["status"] != "finished"
    }
    for path in [*earlier, *(path for path in current if path.is_file())]:
        content: Mapping[str, Any] = read_json(path)
        if path in earlier and (content["status"] != "finished" or content["name"] in broken):
            continue
        metrics |= {f"eval/pruned/{name}": value for name, value in content["metrics"].items()}
        failed |= content.get("failed", {})
    return metrics, failed
