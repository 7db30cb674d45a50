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
from reprune.cache import cache_root, cached_folder
from reprune.calibration.source import TextSet
from reprune.calibration.tokenised import tokenizer_identity
from reprune.errors import ConfigError, RunError
from reprune.evaluation.contract import Evaluator, OnProgress, Outcome, Task
from reprune.files import read_json, sha256_of_json, write_json
from reprune.model.device import DevicePlan
from reprune.model.loading import LoadedModel
from reprune.run_folder import environment_of

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

    A result of which parts failed, or all, is not kept in the cache but in `scratch`, and is tried again by the next run.
    """
    key = {
        **entry.identity,
        "model": model.identity,
        "tokenizer": described_tokenizer(model.tokenizer),
        "dtype": str(model.plan.dtype),
        "device": model.plan.kind,
        "threads": model.plan.num_threads,
        "made_with": LIBRARIES,
    }

    # Not in the folder that the cache throws away with a killed writer: what is finished of it is gone on with.
    begun = cache_root() / "dense_results_begun" / sha256_of_json(key)[:32]

    def write(folder: Path) -> None:
        begun.mkdir(parents=True, exist_ok=True)
        task = Task(model, entry.texts, begun, None, report(f"dense {entry.name}"))
        outcome = _outcome_of(entry, task)
        write_json(begun / OUTCOME, asdict(outcome))
        place = scratch if outcome.failed else folder
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(begun, place)
        shutil.rmtree(begun)
        if outcome.failed:
            raise _IncompleteError

    try:
        folder = cached_folder("dense_results", key, write)
    except _IncompleteError:
        folder = scratch
    return DenseResult(Outcome(**read_json(folder / OUTCOME)), folder)


class _IncompleteError(Exception):
    """Keeps a result of which parts failed out of the cache."""


def _outcome_of(entry: SuiteEntry, task: Task) -> Outcome:
    """What an evaluator finds; where it cannot go on, that it failed and of what, so that the others still count."""
    try:
        return entry.evaluator.evaluate(task)
    except (RunError, torch.OutOfMemoryError) as error:
        return Outcome({}, {entry.name: str(error).splitlines()[0]})


def described_tokenizer(tokenizer: Any) -> list[Any]:
    """What of a tokenizer decides which tokens a text becomes."""
    return [tokenizer_identity(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]


def check_suite(suite: Sequence[SuiteEntry], max_length: int | None) -> None:
    """ConfigError for entries that would claim the same metrics, and for texts that the model's context does not hold.

    So too for whatever else an evaluator puts into a row, see Evaluator.
    """
    claimed: dict[tuple[str, str], str] = {}
    for entry in suite:
        kind = type(entry.evaluator).__name__
        for name in entry.texts or [str(getattr(entry.evaluator, "name", ""))]:
            owner = claimed.setdefault((kind, name), entry.name)
            if owner != entry.name:
                raise ConfigError(
                    f"evaluation.{entry.name}", f"its metrics have the names of those of evaluation.{owner}",
                    value=f"{name or kind}", hint="give the text, or the evaluator, another name",
                )  # fmt: skip
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


def dense_scratch(folder: Path, entry: SuiteEntry) -> Path:
    """Where a run keeps what could be had of the dense model when not all could, until its own result is written."""
    return folder / "evaluations" / f"dense-{entry.hash}"


def evaluate_pruned(
    model: LoadedModel, entry: SuiteEntry, folder: Path, dense: DenseResult, report: Report
) -> None:
    """Evaluate the pruned model and write the result file; a failure is recorded as failed, never as a number."""
    partial = evaluation_file(folder, entry).with_suffix(".part")
    partial.mkdir(parents=True, exist_ok=True)
    task = Task(model, entry.texts, partial, dense.folder, report(f"pruned {entry.name}"))
    write_result(model.plan, entry, folder, _outcome_of(entry, task), dense.outcome)


def write_result(
    plan: DevicePlan, entry: SuiteEntry, folder: Path, outcome: Outcome, dense: Outcome | None
) -> None:
    """Put an evaluator's files into place, then write the result file, with the dense model's numbers that go with it.

    `dense` is None where there is no dense model beside it.
    """
    file = evaluation_file(folder, entry)
    files, partial = file.with_suffix(""), file.with_suffix(".part")
    file.unlink(missing_ok=True)
    shutil.rmtree(files, ignore_errors=True)
    if partial.is_dir() and any(partial.iterdir()):
        partial.rename(files)
    else:
        shutil.rmtree(partial, ignore_errors=True)
    failed = bool(outcome.failed or (dense is not None and dense.failed))
    content = {
        "name": entry.name,
        "identity": entry.identity,
        "environment": environment_of(plan),
        "status": "failed" if failed else "finished",
        **asdict(outcome),
    }
    write_json(file, content if dense is None else {**content, "dense": asdict(dense)})
    shutil.rmtree(dense_scratch(folder, entry), ignore_errors=True)


def finished(folder: Path, entry: SuiteEntry) -> bool:
    """Whether the run has this result already, nothing of it failed, nor of the dense model's."""
    path = evaluation_file(folder, entry)
    return path.is_file() and read_json(path)["status"] == "finished"


def metrics_of(folder: Path, suite: Sequence[SuiteEntry]) -> tuple[dict[str, float], dict[str, str]]:
    """All metrics under 'eval/pruned/…' and, of the same file, 'eval/dense/…'; and what failed of `suite` by part.

    Where earlier evaluations have the same metric the latest counts, and that of `suite` before all; where that one
    failed, none does. So a dense number always stands beside the pruned one that was measured as it was.
    """
    current = {evaluation_file(folder, entry): entry.name for entry in suite}
    earlier = [path for path in (folder / "evaluations").glob("*.json") if path not in current]
    earlier.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    there = [path for path in current if path.is_file()]
    broken = {current[path] for path in there if read_json(path)["metrics"] == {}}
    pruned: dict[str, float] = {}
    dense: dict[str, float] = {}
    failed: dict[str, str] = {}
    for path in [*earlier, *there]:
        content: Mapping[str, Any] = read_json(path)
        if path in earlier and (content["status"] != "finished" or content["name"] in broken):
            continue
        beside = content.get("dense", {"metrics": {}, "failed": {}})
        # A metric that this file has is taken from it on both sides, or not at all.
        for name in {**content["metrics"], **beside["metrics"]}:
            pruned.pop(name, None)
            dense.pop(name, None)
        pruned |= content["metrics"]
        dense |= beside["metrics"]
        if path in current:
            failed |= content["failed"]
            failed |= {f"dense {part}": reason for part, reason in beside["failed"].items()}
    metrics = {f"eval/dense/{name}": value for name, value in dense.items()}
    return metrics | {f"eval/pruned/{name}": value for name, value in pruned.items()}, failed
