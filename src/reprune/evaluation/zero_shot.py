"""Zero-shot and few-shot accuracy by the evaluation harness, with a row an example, confidence and flips."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import sem

from reprune.calibration.source import TextSet
from reprune.errors import ConfigError, RunError, require_nonnegative, require_positive
from reprune.evaluation.batches import attempt, halved
from reprune.evaluation.confidence import confidence
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.examples import (
    examples_file,
    file_name,
    not_finite,
    paired_rows,
    read_examples,
    rows_of,
    write_examples,
)
from reprune.evaluation.harness import SEEDS, VERSION, Measured, measure
from reprune.evaluation.harness_tasks import Tasks, in_a_line, resolve
from reprune.files import read_json, write_json

LOG = logging.getLogger("reprune")


class _FailedError(Exception):
    """Why an entry has no numbers, in a line."""


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, float | int) and math.isfinite(value) else None


def _kept_file(folder: Path, entry: str) -> Path:
    """Where an entry that is finished waits for the others."""
    return folder / f"finished_{file_name(entry)}.json"


@dataclass(kw_only=True)
class ZeroShot:
    """Tasks of the evaluation harness, each run on its own as its command line would, with `num_fewshot` worked examples.

    `tasks` are names of its tasks, groups or tags, or of task files below `include_path`, which come first; null for
    `num_fewshot` is what a task says itself, null for `limit` takes every example. Metrics begin with `name`.

    NAME/TASK/METRIC and NAME/TASK/METRIC_stderr are the harness's own numbers (NAME/TASK/FILTER/METRIC where a task
    has several ways to read an answer), NAME/mean/acc is their mean over the entries of `tasks` that have `acc`, only
    where no entry failed, its error from theirs as independent. Ours from the examples: `ece` and `brier` of
    multiple-choice tasks (see confidence.py), and against the dense model `flips_lost` and `flips_gained`, the shares
    of examples that it had right and this one has wrong, and the reverse.
    """

    tasks: Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    batch_size: int = 16
    name: str = "zero_shot"
    _resolved: Tasks | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_positive(limit=self.limit, batch_size=self.batch_size)
        require_nonnegative(num_fewshot=self.num_fewshot)
        if not self.tasks:
            raise ConfigError("tasks", "no task is named", hint="evaluation.zero_shot.tasks=[boolq,rte]")
        twice = sorted({name for name in self.tasks if list(self.tasks).count(name) > 1})
        if twice:
            raise ConfigError("tasks", "named twice", value=", ".join(twice), hint="name each task once")

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """No windows of ours; ConfigError for tasks that are unknown or whose examples cannot be had."""
        try:
            self._resolved = resolve(self.tasks, self.include_path, self.num_fewshot)
        except ConfigError as error:
            raise error.under(key) from None
        return {}

    @property
    def resolved(self) -> Tasks:
        """The tasks as they were found."""
        if self._resolved is None:
            self._resolved = resolve(self.tasks, self.include_path, self.num_fewshot)
        return self._resolved

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """See Evaluator: each task's config and documents by content, so that files may lie elsewhere."""
        return {
            "evaluator": "zero_shot",
            "name": self.name,
            "harness": VERSION,
            "entries": sorted(self.tasks),
            "tasks": self.resolved.identities,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "seeds": SEEDS,
            # Other neighbours pad, and so round, differently: a greedy answer may become another.
            "batch_size": self.batch_size,
        }

    def evaluate(self, task: Task) -> Outcome:
        """See Evaluator; an entry that fails, for whatever reason, is told by name and the others count.

        What was finished when the same evaluation was interrupted is not asked again.
        """
        outcome = Outcome({})
        sizes = list(self.asked.values())
        accuracies: list[tuple[float, float | None]] = []
        size = self.batch_size
        with task.model.holding(task.model.model):
            for index, entry in enumerate(self.tasks):

                def on_share(share: float, before: int = sum(sizes[:index]), own: int = sizes[index]) -> None:
                    task.on_progress(before + round(share * own), sum(sizes))

                notes: list[str] = []
                try:
                    found, size = self._entry(task, entry, size, notes, on_share)
                except _FailedError as failed:
                    outcome.failed[f"{self.name}/{entry}"] = str(failed)
                else:
                    on_share(1.0)
                    outcome.metrics.update(found["metrics"])
                    accuracies += [(value, error) for value, error in found["accuracies"]]
                outcome.notes.extend(notes)
        if accuracies and not outcome.failed:
            outcome.metrics.update(self._mean(accuracies))
        for entry in self.tasks:
            _kept_file(task.folder, entry).unlink(missing_ok=True)
        return outcome

    def _entry(
        self, task: Task, entry: str, size: int, notes: list[str], on_share: Any
    ) -> tuple[dict[str, Any], int]:
        """Metrics and accuracies of an entry, and the batch size that fitted; kept at once, since a task takes hours."""
        file = _kept_file(task.folder, entry)
        if file.is_file():
            kept: dict[str, Any] = read_json(file)
            notes.extend(kept["notes"])
            return kept, size
        try:
            measured, size = self._measure(task, entry, size, notes, on_share)
        except Exception as error:
            # Tasks are other people's files: what they may raise has no common class but this one.
            LOG.debug("%s/%s", self.name, entry, exc_info=error)
            raise _FailedError(in_a_line(error)) from error
        try:
            metrics = self._metrics(task, measured, notes)
        except RunError as error:
            raise _FailedError(in_a_line(error)) from error
        found = {"metrics": metrics, "accuracies": self._accuracies(measured, entry), "notes": notes}
        write_json(file, found)
        return found, size

    @property
    def asked(self) -> dict[str, int]:
        """How many examples of each entry will be asked."""
        return {entry: self._size(entry) for entry in self.tasks}

    def _size(self, entry: str) -> int:
        """How many examples an entry has, for the bar."""
        sizes = [self.resolved.num_documents[name] for name in self.resolved.members[entry]]
        return sum(size if self.limit is None else min(size, self.limit) for size in sizes)

    def _measure(
        self, task: Task, entry: str, size: int, notes: list[str], on_share: Any
    ) -> tuple[Measured, int]:
        """The harness on one entry, from its beginning again with half the batch where the device is out of memory."""
        while True:
            run = partial(
                measure,
                task.model,
                self.resolved.catalogue,
                entry,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                batch_size=size,
                on_share=on_share,
            )
            made = attempt(run)
            if made is not None:
                return made[0], size
            size = halved(size, notes, f"{self.name}/{entry}")

    def _metrics(self, task: Task, measured: Measured, notes: list[str]) -> dict[str, float]:
        """All metrics of an entry, its examples written. RunError when the model's likelihoods are not numbers."""
        frames = self._frames(measured)
        for name, frame in frames.items():
            broken = not_finite(frame)
            if broken:
                raise RunError(f"{name}: log-likelihoods of {broken} of {len(frame)} examples are NaN")
        metrics = self._told(measured, notes)
        for name, frame in frames.items():
            metrics |= self._own(name, frame)
            if task.dense is not None:
                metrics |= self._flips(name, frame, task.dense, notes)
        for frame in frames.values():
            write_examples(task.folder, frame)
        return metrics

    def _told(self, measured: Measured, notes: list[str]) -> dict[str, float]:
        """The harness's numbers; it says 'N/A' where a metric has no error."""
        metrics: dict[str, float] = {}
        for name, found in measured.results.items():
            for key, value in found.items():
                metric, _, read = key.partition(",")
                if not read or isinstance(value, str):
                    continue
                place = self._place(name, read, metric)
                if math.isfinite(value):
                    metrics[place] = float(value)
                else:
                    notes.append(f"{place} is {value} and left out")
        return metrics

    def _place(self, name: str, read: str, metric: str) -> str:
        """The name of a metric; `read` is the filter that read the answer."""
        return "/".join([self.name, name, *([] if read == "none" else [read]), metric])

    def _frames(self, measured: Measured) -> dict[str, pd.DataFrame]:
        return {
            name: rows_of(name, measured.tasks[name], samples) for name, samples in measured.samples.items()
        }

    def _own(self, name: str, frame: pd.DataFrame) -> dict[str, float]:
        """Calibration, where every example has choices of which one is right."""
        metrics: dict[str, float] = {}
        for read, rows in frame.groupby("filter"):
            if rows["log_likelihoods"].isna().any() or rows["gold"].isna().any():
                continue
            found = confidence(list(rows["log_likelihoods"]), [int(gold) for gold in rows["gold"]])
            values = {
                "ece": found.ece,
                "ece_stderr": found.ece_stderr,
                "brier": found.brier,
                "brier_stderr": found.brier_stderr,
            }
            metrics |= {
                self._place(name, str(read), metric): value
                for metric, value in values.items()
                if value is not None
            }
        return metrics

    def _flips(self, name: str, frame: pd.DataFrame, dense: Path, notes: list[str]) -> dict[str, float]:
        path = examples_file(dense, name)
        if not path.is_file():
            notes.append(f"{self.name}/{name}: no flips, the dense model has no examples of it")
            return {}
        metrics: dict[str, float] = {}
        for read, pairs in paired_rows(read_examples(path), frame).groupby("filter"):
            flips = {
                "flips_lost": pairs["first"] & ~pairs["second"],
                "flips_gained": ~pairs["first"] & pairs["second"],
            }
            for metric, happened in flips.items():
                metrics[self._place(name, str(read), metric)] = float(happened.mean())
                if len(happened) > 1:
                    metrics[self._place(name, str(read), f"{metric}_stderr")] = float(sem(happened))
        return metrics

    def _accuracies(self, measured: Measured, entry: str) -> list[tuple[float, float | None]]:
        """`acc` with its error of a task or group; of a tag or a group without a number of its own, of every task."""
        names = [entry] if "acc,none" in measured.results.get(entry, {}) else list(measured.samples)
        told = [measured.results[name] for name in names if "acc,none" in measured.results[name]]
        found = [it for it in told if math.isfinite(it["acc,none"])]
        errors = [it.get("acc_stderr,none") for it in found]
        return [(float(it["acc,none"]), _finite(error)) for it, error in zip(found, errors, strict=True)]

    def _mean(self, accuracies: Sequence[tuple[float, float | None]]) -> dict[str, float]:
        count = len(accuracies)
        metrics = {f"{self.name}/mean/acc": math.fsum(value for value, _ in accuracies) / count}
        errors = [error for _, error in accuracies if error is not None]
        if len(errors) == count:
            metrics[f"{self.name}/mean/acc_stderr"] = (
                math.sqrt(math.fsum(error**2 for error in errors)) / count
            )
        return metrics
