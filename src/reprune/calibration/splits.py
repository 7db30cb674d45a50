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
        parts[part].append(Document.of_text(text))
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
    size = run_length(tokenizer)
    return [
        document
        for document in documents
        if not shares_any(runs_of(_Tokens(tokenizer).ids(document.text or ""), size), held_out)
    ]


class _Tokens:
    """A tokenizer that can be a cache key: equal where class, vocabulary and rules are."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.key = tokenizer_identity(tokenizer)

    def ids(self, text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokens) and self.key == other.key


_IDENTITIES: dict[int, tuple[Any, str]] = {}


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of a tokenizer's rules, or of its vocabulary where the rules cannot be read."""
    known = _IDENTITIES.get(id(tokenizer))
    if known is None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        known = (tokenizer, hashlib.sha256(rules.encode()).hexdigest())
        _IDENTITIES[id(tokenizer)] = known
    return known[1]


@lru_cache(maxsize=8)
def _held_out_runs(family: tuple[Corpus, ...], tokens: _Tokens) -> Hashes:
    size = run_length(tokens.tokenizer)
    everything, held_out = [], []
    for corpus in family:
        for part, documents in split(corpus).items():
            runs = [runs_of(tokens.ids(document.text or ""), size) for document in documents]
            everything += runs
            held_out += runs if part != "calibration" else []
    _, common = rare_and_common(everything)
    return without(distinct(np.concatenate(held_out)), common)


@lru_cache(maxsize=8)
def _common_runs(family: tuple[Corpus, ...], tokens: _Tokens) -> Hashes:
    size = run_length(tokens.tokenizer)
    _, common = rare_and_common(
        [runs_of(tokens.ids(text), size) for corpus in family for text in corpus.documents]
    )
    return common


def common_runs(tokenizer: Any, corpora: Sequence[Corpus]) -> Hashes:
    """Runs that stand in many documents of the package-index texts, where they are there, or of one of `corpora`."""
    own = {corpus.sha256: corpus for corpus in corpora if not corpus.builtin}
    families: list[tuple[Corpus, ...]] = [(corpus,) for corpus in own.values()]
    if TEXTS.cached():
        families.append(tuple(builtin_corpus(name, "calibration") for name in BUILTIN_FILES))
    found = [_common_runs(family, _Tokens(tokenizer)) for family in families]
    return distinct(np.concatenate([np.empty(0, dtype=np.uint64), *found]))
