"""A row an example: what the model answered and whether that was right, kept so that two runs can be paired."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reprune.files import write_atomically

KEYS = ["doc_id", "doc_hash", "filter"]
"""What tells examples of a task apart: place and content of the document, and the filter that read the answer."""

RIGHT = ("acc", "exact_match")
"""Metrics that say of one example whether it was answered rightly, the first that is there counts."""


def examples_file(folder: Path, task: str) -> Path:
    """Where the examples of a task lie."""
    return folder / f"examples_{file_name(task)}.parquet"


def file_name(task: str) -> str:
    """A task's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", task)


def rows_of(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What the harness logged of a task, a row a document and filter.

    Columns: task, doc_id, doc_hash (sha256, the harness's), filter, target (JSON), gold (index of the right choice),
    log_likelihoods (of every choice, or of the one continuation, nats), predicted (the most likely choice), response
    (what a generation task read from the model), and every metric of the example that is a number. What a task does not have is null.
    """
    choices = getattr(task, "OUTPUT_TYPE", None) == "multiple_choice"
    rows = []
    for sample in samples:
        row: dict[str, Any] = {
            "task": name,
            "doc_id": int(sample["doc_id"]),
            "doc_hash": sample["doc_hash"],
            "filter": sample["filter"],
            "target": json.dumps(sample["target"], default=str),
            "gold": None,
            "log_likelihoods": None,
            "predicted": None,
            "response": None,
        }
        answers = sample["filtered_resps"]
        if choices:
            # Tasks with mutual information ask for every choice twice, the second time without the question.
            count = len(task.doc_to_choice(sample["doc"]))
            row["log_likelihoods"] = [float(answer[0]) for answer in answers[:count]]
            row["predicted"] = int(np.argmax(row["log_likelihoods"]))
            row["gold"] = gold_choice(task, sample["doc"])
        elif isinstance(answers[0], tuple | list) and len(answers[0]) == 2:
            row["log_likelihoods"] = [float(answers[0][0])]
        else:
            row["response"] = answers[0] if isinstance(answers[0], str) else json.dumps(answers, default=str)
        row |= {key: float(sample[key]) for key in sample["metrics"] if _is_number(sample[key])}
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.astype({"gold": "Int64", "predicted": "Int64"}).sort_values(KEYS, ignore_index=True)


def gold_choice(task: Any, doc: Any) -> int | None:
    """The index of the one right choice of a multiple-choice example, by the harness's rules; None where there is no such."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        return None
    return int(gold)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)


def not_finite(frame: pd.DataFrame) -> int:
    """How many examples have a log-likelihood that is not a number, or of no choice a finite one."""
    found = frame["log_likelihoods"].dropna()
    return int(sum(bool(np.isnan(row).any()) or not bool(np.isfinite(row).any()) for row in found))


def write_examples(folder: Path, frame: pd.DataFrame) -> None:
    """Write the examples of one task as Parquet, atomically."""
    write_atomically(
        examples_file(folder, str(frame["task"].iloc[0])), lambda path: frame.to_parquet(path, index=False)
    )


def read_examples(path: Path) -> pd.DataFrame:
    """Read the examples of one task; see `rows_of`."""
    return pd.read_parquet(path)


def right_metric(frame: pd.DataFrame) -> str | None:
    """The column that says whether an example was answered rightly (0 or 1), or None."""
    return next((name for name in RIGHT if name in frame and frame[name].isin([0.0, 1.0]).all()), None)


def paired_rows(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The examples that both have, by document and filter: whether `first` and `second` are right, bool."""
    metric = right_metric(first)
    if metric is None or metric != right_metric(second):
        return pd.DataFrame({"filter": [], "first": [], "second": []})
    columns = [*KEYS, metric]
    both = first[columns].merge(second[columns], on=KEYS, validate="one_to_one", suffixes=("_1", "_2"))
    return pd.DataFrame(
        {
            "filter": both["filter"],
            "first": both[f"{metric}_1"].astype(bool),
            "second": both[f"{metric}_2"].astype(bool),
        }
    )
