"""How far a model's confidence in its choices is from how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import bootstrap, sem

from reprune.seeding import seed_for

NUM_BINS = 15
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Confidence:
    """Both with a standard error; None where a single example gives none."""

    ece: float
    ece_stderr: float | None
    brier: float
    brier_stderr: float | None


def confidence(log_likelihoods: Sequence[Sequence[float]], gold: Sequence[int]) -> Confidence:
    """Calibration of multiple-choice answers: log-likelihoods in nats, a row an example, rows may differ in length.

    p is the softmax over an example's choices, its answer the most likely one, its confidence max p.
    ECE: expected calibration error over 15 bins of equal width, Σ_b (n_b/n)·|accuracy_b − confidence_b| (Guo et al.
    2017, eq. 3; bins are (0, 1/15], (1/15, 2/15] …). Brier: the mean of Σ_k (p_k − y_k)², y one-hot (Brier 1950), from
    0 to 2. The error of ECE is a bootstrap's over examples (1,000 resamples), that of Brier s/√n.
    """
    rows = [softmax(np.asarray(row, dtype=np.float64)) for row in log_likelihoods]
    assert rows
    assert len(rows) == len(gold)
    sure = np.array([row.max() for row in rows])
    right = np.array([int(row.argmax()) == index for row, index in zip(rows, gold, strict=True)])
    squares = np.array(
        [np.sum((row - np.eye(len(row))[index]) ** 2) for row, index in zip(rows, gold, strict=True)]
    )
    many = len(rows) > 1
    return Confidence(
        ece=expected_calibration_error(sure, right),
        ece_stderr=_ece_stderr(sure, right) if many else None,
        brier=float(squares.mean()),
        brier_stderr=float(sem(squares)) if many else None,
    )


def expected_calibration_error(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """ECE of confidences in (0, 1] and whether each answer is right; see `confidence`."""
    # With n_b in front, a bin's share is the sum of its examples' gaps: no bin needs a mean of its own.
    gaps = np.bincount(_bins(sure), weights=right - sure, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(sure))


def _bins(sure: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.digitize(sure, np.arange(1, NUM_BINS) / NUM_BINS, right=True)


def _ece_stderr(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    found = bootstrap(
        (np.arange(len(sure)),),
        lambda chosen: expected_calibration_error(sure[chosen], right[chosen]),
        vectorized=False,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed_for(0, "expected calibration error")),
    )
    return float(found.standard_error)
