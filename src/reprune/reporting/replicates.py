"""Which runs are replicates of one arm, and what they come to: seeds within calibration sets, sets within an arm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from reprune.errors import ConfigError, did_you_mean

SET = ("config/calibration.set", "config/seed_data")
"""What makes another calibration set: its number, or the seed that draws it. `results` has the seed that counts."""

PART_SETS = re.compile(r"config/calibration\..*\.set")

REPLICATES = re.compile(
    r"config/(seed|seed_data|seed_training)|config/(calibration|reconstruction_data)\.(.*\.)?set"
)
"""What runs of one arm may differ in: also which sets the parts of a mixture are."""

IRRELEVANT = (
    "config/output_dir",
    "config/experiment",
    "config/published",
    "config/threads",
    "config/dry_run",
    "config/profile",
    "config/memory.",
    "config/tracking.",
    "config/export.",
    "config/evaluation.",
)
"""What makes no other arm: it changes no number of the pruned model, or only which numbers there are."""

FREE = ("config/reconstruction", "config/probes", "config/validation")
"""What runs that differ in reconstruction alone may differ in, beside what changes no number."""


def like_runs(frame: pd.DataFrame) -> Iterator[pd.Index]:
    """The index of each group of runs that agree in all but reconstruction, held-out text, seeds and sets."""
    shared = [
        column
        for column in map(str, frame)
        if column.startswith("config/")
        and not column.startswith((*FREE, *IRRELEVANT))
        and not REPLICATES.fullmatch(column)
    ]
    alike = pd.Series(["\0".join(map(str, row)) for row in frame[shared].to_numpy()], frame.index)
    for _, runs in alike.groupby(alike, sort=False):
        yield runs.index


def set_keys(frame: pd.DataFrame) -> list[str]:
    """The columns that tell calibration sets apart, those of a mixture's parts among them."""
    return [column for column in map(str, frame) if column in SET or PART_SETS.fullmatch(column)]


def source_keys(frame: pd.DataFrame) -> list[str]:
    """The same, with what tells calibration sets of several sources and models apart."""
    choices = ("choice/calibration", "choice/model")
    return [*set_keys(frame), *(column for column in choices if column in frame)]


def arms_of(frame: pd.DataFrame) -> list[str]:
    """The config columns in which runs differ and that make another arm: not replicates, nor what changes no number."""
    return [
        column
        for column in frame.columns
        if str(column).startswith("config/")
        and not REPLICATES.fullmatch(str(column))
        and not str(column).startswith(IRRELEVANT)
        and frame[column].astype(str).nunique(dropna=False) > 1
    ]


def value_by_set(frame: pd.DataFrame, arm: Mapping[str, Any], metric: str) -> pd.Series:
    """A metric (see `metric_of`) of the runs that `chosen` gives for `arm`, by calibration set; mean over what else is a seed.

    ConfigError for a column that is not there, and for runs of one set that differ in more than a seed.
    """
    runs = chosen(frame, arm)
    differ = arms_of(runs)
    if differ:
        raise ConfigError(
            "claims", "these runs are several arms, so that they are no replicates", value=dict(arm),
            accepted=f"one value for {', '.join(differ)}",
        )  # fmt: skip
    keys = set_keys(runs)
    if not keys or runs.empty:
        return pd.Series(dtype=float)
    return metric_of(runs, metric).groupby([runs[key] for key in keys], dropna=False).mean()


def chosen(frame: pd.DataFrame, wanted: Mapping[str, Any], *others: str) -> pd.DataFrame:
    """The runs in which every column has its value, one of a list of values, or for None no value.

    ConfigError for a column that is not there, among them or `others`.
    """
    found = frame
    for column in (*wanted, *others):
        if column not in frame:
            raise ConfigError(
                "claims", "no run has this column", value=column, hint=did_you_mean(column, map(str, frame.columns))
            )  # fmt: skip
    for column, value in wanted.items():
        if value is None:
            found = found[found[column].isna()]
        else:
            found = found[found[column].isin(value if isinstance(value, list) else [value])]
    return found


def metric_of(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column of numbers; for a name with `*`, the geometric mean of all columns it stands for (`*` is no slash).

    A run that lacks one of them has no mean. ConfigError where no run has such a column.
    """
    pattern = re.compile(re.escape(name).replace(r"\*", "[^/]+"))
    columns = [column for column in frame if pattern.fullmatch(str(column))]
    if not columns:
        raise ConfigError(
            "claims", "no run has this metric", value=name, hint=did_you_mean(name, map(str, frame.columns))
        )
    values = frame[columns].astype(float)
    if len(columns) == 1:
        return values[columns[0]]
    return values.apply(np.log).mean(axis=1, skipna=False).apply(np.exp)


def summarise(frame: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """A row an arm: the columns in which arms differ, `runs`, `sets`, and for each metric its mean and `METRIC std`.

    The unit is the calibration set: seeds of one set are averaged first; the standard deviation is over sets (n − 1),
    missing for a single one.
    """
    finished = frame[frame["state"] == "finished"]
    arms = arms_of(finished)
    keys = set_keys(finished)
    rows = []
    groups = finished.groupby(arms, dropna=False, sort=False) if arms else [((), finished)]
    for values, runs in groups:
        by_set = runs.groupby(keys, dropna=False)[metrics].mean() if keys else runs[metrics]
        row: dict[str, Any] = dict(zip(arms, values, strict=True)) if arms else {}
        row |= {"runs": len(runs), "sets": len(by_set)}
        for metric in metrics:
            row[metric] = by_set[metric].mean()
            row[f"{metric} std"] = by_set[metric].std(ddof=1)
        rows.append(row)
    return pd.DataFrame(rows)


def with_words(names: pd.Series, frame: pd.DataFrame, *choices: str) -> pd.Series:
    """`names` with each of the choices in which named runs differ put before them; the option `none` has no word."""
    for choice in choices:
        if f"choice/{choice}" not in frame:
            continue
        words = frame[f"choice/{choice}"].astype(object).fillna("none").astype(str)
        if words[names.notna()].nunique() > 1:
            names = names.where(words == "none", words.str.cat(names, sep=" "))
    return names


def arm_names(frame: pd.DataFrame) -> pd.Series:
    """The arm of every finished run in words: transform, pruner and pattern where several, technique, and what else differs.

    Runs have one name if and only if they are replicates of one arm.
    """
    names = frame["choice/reconstruction"].astype(str)
    if "choice/arm" in frame:
        names = frame["choice/arm"].where(frame["choice/arm"].notna(), names).astype(str)
    names = with_words(names, frame, "pattern", "pruner", "transform")
    for _, runs in frame.groupby(names, sort=False):
        for column in arms_of(runs):
            # Whole keys where the last part of them is not one key.
            last = column.rpartition(".")[2].removeprefix("config/")
            twice = (
                sum(other.rpartition(".")[2].removeprefix("config/") == last for other in arms_of(runs)) > 1
            )
            key = column.removeprefix("config/") if twice else last
            # What is missing has no text of its own, and would leave the run without a name.
            values = runs[column].map(str, na_action="ignore").astype(object).fillna("null")
            names.loc[runs.index] += f" {key}=" + values
    return names
