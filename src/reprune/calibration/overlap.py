"""Runs of 13 tokens: whether one text stands in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RUN_TOKENS = 13
RUN_BYTES = 64
MANY_DOCUMENTS = 5
_BASE = np.uint64(0x9E3779B97F4A7C15)

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def run_length(tokenizer: Any) -> int:
    """13 tokens; for tokenizers of single bytes the 64 bytes that so many tokens stand for."""
    return RUN_TOKENS if len(tokenizer) > 1000 else RUN_BYTES


def runs_of(ids: np.ndarray[Any, np.dtype[np.int64]], size: int) -> Hashes:
    """Distinct 64-bit hashes of every run of `size` ids; empty for shorter texts."""
    if len(ids) < size:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64) + np.uint64(1), size)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(size, _BASE, dtype=np.uint64), dtype=np.uint64)
        mixed = (windows * powers).sum(axis=1, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(29)
    return distinct(mixed)


def distinct(runs: Hashes) -> Hashes:
    """Sorted and each once. By sorting: numpy's hashing `unique` takes minutes on evenly spread 64-bit numbers."""
    runs = np.sort(runs)
    return runs[np.concatenate([[True], runs[1:] != runs[:-1]])] if len(runs) else runs


def without(runs: Hashes, others: Hashes) -> Hashes:
    """The runs of one sorted set that are not in another."""
    return runs[~np.isin(runs, others, assume_unique=True, kind="sort")] if len(others) else runs


def rare_and_common(runs_by_document: Sequence[Hashes]) -> tuple[Hashes, Hashes]:
    """Split the runs of documents into those in fewer than five documents and the others."""
    if not runs_by_document:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)
    runs, counts = np.unique(np.concatenate(runs_by_document), return_counts=True)
    return runs[counts < MANY_DOCUMENTS], runs[counts >= MANY_DOCUMENTS]


def shares_any(runs: Hashes, others: Hashes) -> bool:
    """Whether a run of one set is in the other, both as `distinct` gives them."""
    if not len(runs) or not len(others):
        return False
    places = np.searchsorted(others, runs).clip(max=len(others) - 1)
    return bool((others[places] == runs).any())
