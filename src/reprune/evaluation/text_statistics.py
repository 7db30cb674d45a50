"""Numbers of written text: repetition, distinct n-grams, likelihood, overlap; each with a standard error over prompts.

A row is one continuation; `prompt_of` says which prompt it belongs to. Prompts, not rows, are the units of a standard
error: what is written behind one prompt several times is no new sample of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import sem

from reprune.calibration.describe import Ids, ngrams, repeated_shares

REPETITION_TOKENS = 4
DISTINCT_TOKENS = (1, 2, 3)
OVERLAP_WORDS = (1, 2, 3)
STANDARD_ERROR = "_stderr"
_GAP = -1

Floats = NDArray[np.float64]


def with_error(name: str, value: float, error: float | None) -> dict[str, float]:
    """A metric, and its standard error as 'NAME_stderr' where there is one."""
    return {name: value, **({} if error is None else {f"{name}{STANDARD_ERROR}": error})}


def mean_over_prompts(name: str, values: Sequence[float], prompt_of: Sequence[int]) -> dict[str, float]:
    """The mean over prompts of the mean of each one's rows, with its standard error; nothing of no rows."""
    if not len(values):
        return {}
    units = _sums(np.asarray(values), prompt_of) / _sums(np.ones(len(values)), prompt_of)
    return with_error(name, math.fsum(units) / len(units), float(sem(units)) if len(units) > 1 else None)


def _sums(values: Floats, prompt_of: Sequence[int]) -> Floats:
    """Sums over the rows of each prompt that has any."""
    units = np.unique(np.asarray(prompt_of), return_inverse=True)[1]
    return np.bincount(units, weights=values).astype(np.float64)


def perplexity(
    name: str, losses: Sequence[float], tokens: Sequence[int], prompt_of: Sequence[int]
) -> dict[str, float]:
    """exp of the loss per token over all rows (token-weighted), from each row's summed loss in nats and token count.

    The standard error is that of a ratio estimator (Cochran 1977, §2.11), carried through exp by its slope. Raises
    OverflowError for a mean loss that no float holds the exp of.
    """
    summed, counted = _sums(np.asarray(losses, float), prompt_of), _sums(np.asarray(tokens, float), prompt_of)
    mean = float(summed.sum() / counted.sum())
    value, units = math.exp(mean), len(summed)
    if units == 1:
        return {name: value}
    spread = float(((summed - mean * counted) ** 2).sum()) * units / (units - 1)
    return with_error(name, value, value * math.sqrt(spread) / float(counted.sum()))


def repetition(
    name: str, rows: Sequence[Sequence[int]], prompt_of: Sequence[int], size: int = REPETITION_TOKENS
) -> dict[str, float]:
    """The share of a row's `size`-grams that occurred before in the same row, mean over prompts.

    It is seq-rep-n (Welleck et al. 2020, arXiv 1908.04319). Rows without such an n-gram do not count.
    """
    flat, row_of = _flat(rows)
    grams, places = ngrams(flat, size)[size]
    shares = repeated_shares(grams, row_of[places])
    return mean_over_prompts(name, list(shares.values()), [prompt_of[row] for row in shares])


def distinct(
    name: str, rows: Sequence[Sequence[int]], prompt_of: Sequence[int], size: int
) -> dict[str, float]:
    """Different `size`-grams over all `size`-grams of all rows (distinct-n, Li et al. 2016, arXiv 1510.03055).

    No n-gram reaches over the end of a row. The standard error is the jackknife's over prompts (Efron 1979). Nothing
    where no row is long enough.
    """
    flat, row_of = _flat(rows)
    grams, places = ngrams(flat, size)[size]
    if not len(grams):
        return {}
    units = np.unique(np.asarray(prompt_of), return_inverse=True)[1]
    unit_of = units[row_of[places]]
    count = int(units.max()) + 1
    different, total = len(np.unique(grams)), len(grams)
    of_unit = np.bincount(unit_of, minlength=count)
    # What would be lost without a unit: the n-grams that only it has.
    pairs = np.unique(np.stack([grams, unit_of]), axis=1)
    alone = np.bincount(pairs[0])[pairs[0]] == 1
    only = np.bincount(pairs[1][alone], minlength=count)
    if count == 1 or (of_unit == total).any():
        return {name: different / total}
    without = (different - only) / (total - of_unit)
    spread = float(((without - without.mean()) ** 2).sum())
    return with_error(name, different / total, math.sqrt(spread * (count - 1) / count))


def overlap(written: Sequence[str], source: Sequence[str], size: int) -> float | None:
    """The share of the `size`-grams of `written` that occur in `source`; None where it has none.

    1 − novel n-grams (See, Liu & Manning 2017, arXiv 1704.04368, §5). Both are lists of words.
    """
    grams = _grams(written, size)
    there = set(_grams(source, size))
    return sum(gram in there for gram in grams) / len(grams) if grams else None


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _flat(rows: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """All rows one after the other, a gap behind each; and the row of each place."""
    flat = np.array([token for row in rows for token in (*row, _GAP)], dtype=np.int64)
    return flat, np.repeat(np.arange(len(rows)), [len(row) + 1 for row in rows])
