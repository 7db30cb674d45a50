"""Every document belongs to one part: calibration, validation, probe or evaluation.

The part follows from the documents alone, so no seed moves a document from evaluation into calibration.
Calibration documents that share a rare run of 13 tokens with a held-out document are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from reprune.calibration.corpus import BUILTIN_FILES, Corpus, builtin_corpus
from reprune.calibration.overlap import (
    Hashes,
    distinct,
    rare_and_common,
    run_length,
    runs_of,
    shares_any,
    without,
)
from reprune.calibration.source import Document, Part
from reprune.calibration.tokenised import token_ids, tokenizer_identity
from reprune.model.assets import TEXTS

SHARES: dict[Part, float] = {"calibration": 0.5, "validation": 0.1, "probe": 0.2, "evaluation": 0.2}


@lru_cache(maxsize=16)
def split(corpus: Corpus) -> dict[Part, list[Document]]:
    """Deal the documents, in the order of their hashes, to the part that is furthest below its share of characters."""
    order = sorted(corpus.documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    parts: dict[Part, list[Document]] = {part: [] for part in SHARES}
    filled = dict.fromkeys(SHARES, 0)
    for text in order:
        part = min(SHARES, key=lambda name: filled[name] / SHARES[name])
        parts[part].append(Document.of_text(text, corpus))
        filled[part] += len(text)
    return parts


def documents_of(corpus: Corpus, part: Part, tokenizer: Any, key: str) -> list[Document]:
    """The documents of one part; for calibration without those that overlap a held-out document.

    A package-index text is held against the held-out parts of all package-index texts, a user's text against its own.
    """
    documents = split(corpus)[part]
    if part != "calibration":
        return documents
    family = [builtin_corpus(name, key) for name in BUILTIN_FILES] if corpus.builtin else [corpus]
    held_out = _held_out_runs(tuple(family), _Tokens(tokenizer))
    runs = _runs(corpus, _Tokens(tokenizer))
    return [document for document in documents if not shares_any(runs[document.text or ""], held_out)]


class _Tokens:
    """A tokenizer that can be a cache key: equal where class, vocabulary and rules are."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.key = tokenizer_identity(tokenizer)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokens) and self.key == other.key


@lru_cache(maxsize=8)
def _runs(corpus: Corpus, tokens: _Tokens) -> dict[str, Hashes]:
    """The runs of every document, by its text."""
    size = run_length(tokens.tokenizer)
    ids = token_ids(corpus, tokens.tokenizer, specials=False)
    return {text: runs_of(row.numpy(), size) for text, row in ids.items()}


@lru_cache(maxsize=8)
def _held_out_runs(family: tuple[Corpus, ...], tokens: _Tokens) -> Hashes:
    everything: list[Hashes] = []
    held_out: list[Hashes] = []
    for corpus in family:
        runs = _runs(corpus, tokens)
        everything += runs.values()
        for part, documents in split(corpus).items():
            held_out += [runs[document.text or ""] for document in documents if part != "calibration"]
    _, common = rare_and_common(everything)
    return without(distinct(np.concatenate(held_out)), common)


@lru_cache(maxsize=8)
def _common_runs(family: tuple[Corpus, ...], tokens: _Tokens) -> Hashes:
    _, common = rare_and_common([runs for corpus in family for runs in _runs(corpus, tokens).values()])
    return common


def common_runs(tokenizer: Any, corpora: Sequence[Corpus]) -> Hashes:
    """Runs that stand in many documents of the package-index texts, where they are there, or of one of `corpora`."""
    own = {corpus.sha256: corpus for corpus in corpora if not corpus.builtin}
    families: list[tuple[Corpus, ...]] = [(corpus,) for corpus in own.values()]
    if TEXTS.cached():
        families.append(tuple(builtin_corpus(name, "calibration") for name in BUILTIN_FILES))
    found = [_common_runs(family, _Tokens(tokenizer)) for family in families]
    return distinct(np.concatenate([np.empty(0, dtype=np.uint64), *found]))
