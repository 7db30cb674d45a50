"""Run a suite of evaluators and keep each result as a file of its own; dense results come from the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from reprune import RESULTS_VERSION
from reprune.cache import cached_folder
from reprune.calibration.source import TextSet
from reprune.errors import RunError
from reprune.evaluation.contract import Evaluator, OnProgress
from reprune.files import read_json, sha256_of_json, write_json
from reprune.model.loading import LoadedModel

LIBRARIES = [torch.__version__, transformers.__version__]
"""Part of a cache key: another version may give other last digits, or other kernels."""

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


def dense_metrics(model: LoadedModel, entry: SuiteEntry, report: Report) -> dict[str, float]:
    """The dense model's result: computed once for model, evaluator, dtype and device, then read from the cache."""
    key = {
        **entry.identity,
        "model": model.identity,
        "dtype": str(model.plan.dtype),
        "device": model.plan.kind,
        "threads": model.plan.num_threads,
        "made_with": LIBRARIES,
    }

    def write(folder: Path) -> None:
        metrics = entry.evaluator.evaluate(model, entry.texts, report(f"dense {entry.name}"))
        write_json(folder / "metrics.json", metrics)

    metrics: dict[str, float] = read_json(cached_folder("dense_evaluations", key, write) / "metrics.json")
    return metrics


def evaluation_file(folder: Path, entry: SuiteEntry) -> Path:
    """Where a run keeps the result of an evaluator."""
    return folder / "evaluations" / f"{entry.hash}.json"


def evaluate_pruned(model: LoadedModel, entry: SuiteEntry, folder: Path, report: Report) -> None:
    """Evaluate the pruned model and write the result file; a failure is recorded as failed, never as a number."""
    content: dict[str, Any] = {"name": entry.name, "identity": entry.identity}
    try:
        metrics = entry.evaluator.evaluate(model, entry.texts, report(f"pruned {entry.name}"))
        content |= {"status": "finished", "metrics": metrics}
    except RunError as error:
        content |= {"status": "failed", "error": str(error), "metrics": {}}
    write_json(evaluation_file(folder, entry), content)


def finished(folder: Path, entry: SuiteEntry) -> bool:
    """Whether the run has this result already."""
    path = evaluation_file(folder, entry)
    return path.is_file() and read_json(path)["status"] == "finished"


def metrics_of(folder: Path, suite: Sequence[SuiteEntry]) -> tuple[dict[str, float], dict[str, str]]:
    """All pruned metrics of a run under 'eval/pruned/…', and what failed by evaluator.

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
        if content["status"] != "finished":
            failed[content["name"]] = content["error"]
    return metrics, failed
