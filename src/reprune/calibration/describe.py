"""Numbers that describe a calibration set: its size, its vocabulary, its repetition, its language.

Every number is the same for every order of the windows. Special tokens (BOS, end-of-text, …) are left out, and no
n-gram reaches over one, so that packed documents make no n-gram together. Only the perplexity needs the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprune.calibration.generated import detected_language
from reprune.calibration.overlap import distinct, run_length, runs_of
from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.calibration.vocabulary import ordinary_tokens
from reprune.model.likelihood import row_losses
from reprune.model.loading import LoadedModel

LOG = logging.getLogger("reprune")

Description = dict[str, float | None]
"""Numbers by name; None where the text is too short for one."""

Ids = np.ndarray[Any, np.dtype[np.int64]]

REPETITION_TOKENS = 4
DISTINCT_TOKENS = (1, 2, 3, 4)
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
_STEPS = 100
_GAP = -1


def describe(text: TextSet, tokenizer: Any, model: LoadedModel | None = None) -> Description:
    """The numbers of a text set; those of its perplexity only with the dense `model`.

    `windows`, `length` and `tokens` (without special ones) are counts. `documents_per_window` is documents over
    windows. `vocabulary_coverage` is `types` over the tokens of the vocabulary that are not special. `repetition` is
    `repeated_share` of 4-grams, `distinct_N` distinct N-grams over all N-grams of the set. `duplicates` is the share
    of windows that equal another one, `near_duplicates` of those that hold a run of 13 tokens of another one (64 for
    tokenizers of single bytes). `english` is the share of windows that py3langid calls English.
    """
    windows, length = text.tokens_NT.shape
    flat = _flat(text.tokens_NT, tokenizer)
    window_of = np.repeat(np.arange(windows), length + 1)
    tokens = flat[flat != _GAP]
    types, counts = np.unique(tokens, return_counts=True)
    found: Description = {
        "windows": windows,
        "length": length,
        "tokens": len(tokens),
        "documents": len(text.document_ids),
        "documents_per_window": len(text.document_ids) / windows,
        "types": len(types),
        "vocabulary_coverage": len(types) / len(ordinary_tokens(tokenizer)),
    }
    for size, (grams, places) in ngrams(flat, max(*DISTINCT_TOKENS, REPETITION_TOKENS)).items():
        if size in DISTINCT_TOKENS:
            found[f"distinct_{size}"] = len(np.unique(grams)) / len(grams) if len(grams) else None
        if size == REPETITION_TOKENS:
            found["repetition"] = repeated_share(grams, window_of[places])
    found["zipf_exponent"] = zipf_exponent(counts)
    found["duplicates"] = _duplicates(text.tokens_NT)
    found["near_duplicates"] = _near_duplicates(flat, window_of, windows, run_length(tokenizer))
    found["english"] = _english(text.tokens_NT, tokenizer)
    return {**found, **(perplexities(model, text.tokens_NT, text.positions_NT) if model is not None else {})}


def _flat(tokens_NT: Tensor, tokenizer: Any) -> Ids:
    """All windows one after the other, a gap behind each and in place of every special token."""
    ends = torch.full((len(tokens_NT), 1), _GAP, dtype=torch.long)
    flat = torch.cat([tokens_NT, ends], dim=1).flatten().numpy().copy()
    flat[np.isin(flat, list(tokenizer.all_special_ids))] = _GAP
    return flat


def ngrams(flat: Ids, longest: int) -> dict[int, tuple[Ids, Ids]]:
    """By size: a number for each n-gram without a gap, equal for equal n-grams, and the place where it begins.

    The last id has to be a gap.
    """
    places = np.flatnonzero(flat != _GAP)
    grams = np.unique(flat[places], return_inverse=True)[1].astype(np.int64)
    found = {1: (grams, places)}
    base = int(flat.max(initial=0)) + 1
    for size in range(2, longest + 1):
        # What begins at a place without a gap ends before the last id at the latest.
        whole = flat[places + size - 1] != _GAP
        places, grams = places[whole], grams[whole]
        longer = grams * base + flat[places + size - 1]
        grams = np.unique(longer, return_inverse=True)[1].astype(np.int64)
        found[size] = (grams, places)
    return found


def repeated_share(grams: Ids, window_of: Ids) -> float | None:
    """The share of n-grams that occurred earlier in the same window, mean over windows.

    It is seq-rep-n = 1 − distinct n-grams / n-grams of a sequence (Welleck et al. 2020, arXiv 1908.04319).
    """
    shares = repeated_shares(grams, window_of)
    return math.fsum(shares.values()) / len(shares) if shares else None


def repeated_shares(grams: Ids, window_of: Ids) -> dict[int, float]:
    """The share of every window that has n-grams at all, by window; see `repeated_share`."""
    if not len(grams):
        return {}
    total = np.bincount(window_of)
    pairs = np.unique(window_of * (int(grams.max()) + 1) + grams)
    different = np.bincount(pairs // (int(grams.max()) + 1), minlength=len(total))
    there = np.flatnonzero(total)
    shares = 1 - different[there] / total[there]
    return dict(zip(there.tolist(), shares.tolist(), strict=True))


def zipf_exponent(counts: Ids) -> float | None:
    """The s of P(rank r) ∝ r^−s over the ranks 1 … V of the V types that occur, by maximum likelihood.

    It is where the mean of log r under P equals that of the tokens; maximum likelihood because a line through log-log
    points is biased by the rare types (Clauset, Shalizi & Newman 2009, arXiv 0706.1062). None with a single type.
    """
    ordered = np.sort(counts)[::-1].astype(np.float64)
    if len(ordered) < 2:
        return None
    logs = np.log(np.arange(1, len(ordered) + 1))
    wanted = float(ordered @ logs) / float(ordered.sum())

    def expected(exponent: float) -> float:
        weights = np.exp(-exponent * logs)
        return float(weights @ logs) / float(weights.sum())

    low, high = 0.0, 1.0
    while expected(high) > wanted:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > wanted else (low, middle)
    return (low + high) / 2


def _duplicates(tokens_NT: Tensor) -> float:
    _, counts = torch.unique(tokens_NT, dim=0, return_counts=True)
    return int(counts[counts > 1].sum()) / len(tokens_NT)


def _near_duplicates(flat: Ids, window_of: Ids, windows: int, size: int) -> float:
    gaps = np.flatnonzero(flat == _GAP)
    starts = np.concatenate([[0], gaps[:-1] + 1])
    by_window: list[list[np.ndarray[Any, np.dtype[np.uint64]]]] = [[] for _ in range(windows)]
    for start, stop in zip(starts.tolist(), gaps.tolist(), strict=True):
        by_window[int(window_of[stop])].append(runs_of(flat[start:stop], size))
    runs = [distinct(np.concatenate(parts)) for parts in by_window]
    every, which, counts = np.unique(np.concatenate(runs), return_inverse=True, return_counts=True)
    if not len(every):
        return 0.0
    shared = np.repeat(np.arange(windows), [len(part) for part in runs])[counts[which] > 1]
    return len(np.unique(shared)) / windows


def _english(tokens_NT: Tensor, tokenizer: Any) -> float:
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens_NT]
    return sum(bool(text) and detected_language(text) == "en" for text in texts) / len(texts)


def perplexities(model: LoadedModel, tokens_NT: Tensor, positions_NT: Tensor | None = None) -> Description:
    """exp of the windows' mean loss in nats of every token but the first of a text, and quantiles over windows.

    None where windows are a single token, the losses are not finite, or the device cannot hold the model.
    """
    names = ["perplexity", *(f"perplexity_{name}" for name in QUANTILES)]
    if tokens_NT.shape[1] < 2:
        return dict.fromkeys(names)
    try:
        losses = row_losses(model, tokens_NT, positions_NT).sort().values
    except torch.OutOfMemoryError:
        # A model that is pruned block by block may be larger than the device; its text has no perplexity then.
        LOG.warning("the device cannot hold the whole model: no perplexity of the calibration text")
        return dict.fromkeys(names)
    means = [math.fsum(losses.tolist()) / len(losses)]
    means += torch.quantile(losses, torch.tensor(list(QUANTILES.values()), dtype=losses.dtype)).tolist()
    return {name: _exp(mean) for name, mean in zip(names, means, strict=True)}


def _exp(mean: float) -> float | None:
    return math.exp(mean) if math.isfinite(mean) and mean < math.log(torch.finfo(torch.float64).max) else None


def describe_run(
    texts: Texts, tokenizer: Any, model: LoadedModel | None, overlap: Mapping[str, float]
) -> dict[str, Any]:
    """What a run keeps beside its token ids: uses, source, hash and description of every text by 'role/name', and `overlap`.

    Only the calibration texts get a perplexity: the others are evaluated, or measured block by block.
    """
    uses = {
        "mask": texts.mask,
        "reconstruction": texts.reconstruction,
        "validation": texts.validation,
        "probe": texts.probes,
    }
    kept = {}
    for text in texts.all:
        kept[f"{text.role}/{text.name}"] = {
            "uses": [use for use, group in uses.items() if any(text.key == one.key for one in group)],
            "source": text.source,
            "sha256": text.key,
            "description": describe(text, tokenizer, model if text.role == "calibration" else None),
        }
    return {"texts": kept, "overlap": dict(overlap)}
