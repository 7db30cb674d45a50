"""Which technique fits the calibration text: against another its error falls there, and rises on held-out text."""

from __future__ import annotations

from itertools import permutations

import pandas as pd

from reprune.reporting.gap import last_columns
from reprune.reporting.replicates import arm_names, like_runs, source_keys
from reprune.reporting.verdicts import judge

COLUMNS = (
    "arm",
    "against",
    "calibration",
    "held_out",
    "calibration_change",
    "held_out_change",
    "sets",
    "verdict",
)
FITS, DOES_NOT, CANNOT_SAY = "fits the calibration text", "does not", "cannot say"


def fitting(frame: pd.DataFrame) -> pd.DataFrame:
    """A row two arms, calibration text and held-out text, where the mean calibration error of `arm` is the smaller one.

    The arms agree in mask data and all else but reconstruction. Changes are shares of the other's last-block error, means
    over calibration sets, paired by set; seeds of a set are averaged first. By the rule of `verdicts.judge`: `arm` fits
    the calibration text where the whole interval of the first change lies below zero and that of the second above;
    it does not where that of the second lies below; else nothing can be said. Noise is not flagged.
    """
    finished = frame[frame["state"] == "finished"]
    rows = []
    if len(finished):
        names = arm_names(finished)
        for index in like_runs(finished):
            runs = finished.loc[index]
            for arm, against in permutations(dict.fromkeys(names[runs.index]), 2):
                rows += _rows(
                    runs[names[runs.index] == arm], runs[names[runs.index] == against], arm, against
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(first: pd.DataFrame, second: pd.DataFrame, arm: str, against: str) -> list[tuple[object, ...]]:
    changes = {}
    for role in ("calibration", "probe"):
        for text, column in last_columns(first, role).items():
            pairs = pd.concat(
                [_by_set(first, column), _by_set(second, column)], axis=1, join="inner"
            ).dropna()
            if len(pairs):
                changes[role, text] = pairs.iloc[:, 0] / pairs.iloc[:, 1] - 1
    rows: list[tuple[object, ...]] = []
    for (role, text), falls in changes.items():
        if role != "calibration" or falls.mean() >= 0:
            continue
        for (other, held_out), rises in changes.items():
            if other == "probe":
                down, up = judge(list(falls), "below", 0.0).word, judge(list(rises), "above", 0.0).word
                verdict = (
                    DOES_NOT
                    if up == "does not hold"
                    else FITS
                    if (down, up) == ("holds", "holds")
                    else CANNOT_SAY
                )
                rows.append((arm, against, text, held_out, falls.mean(), rises.mean(), len(rises), verdict))
    return rows


def _by_set(runs: pd.DataFrame, column: str) -> pd.Series:
    keys = source_keys(runs)
    return runs[column].astype(float).groupby([runs[key] for key in keys], dropna=False).mean()
