"""The token ids of a text's documents, made once for all runs that share text and tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from reprune import RESULTS_VERSION
from reprune.cache import cached_folder
from reprune.calibration.corpus import Corpus
from reprune.tensor_files import write_tensors

BATCH = 1000
FILE = "tokens.safetensors"
SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")


def token_ids(corpus: Corpus, tokenizer: Any, specials: bool) -> dict[str, Tensor]:
    """The ids of every document by its text, int64 [length], in the order of the corpus; kept in the project's cache.

    `specials` asks for the tokens that the tokenizer adds by itself.
    """
    key = (corpus.sha256, corpus.builtin, corpus.name, tokenizer_identity(tokenizer), specials)
    return _token_ids(_Wanted(key, corpus, tokenizer))


@dataclass(frozen=True)
class _Wanted:
    """Equal by what tells texts and tokenizers apart: hashing a long text at each call would cost more than it saves."""

    key: tuple[str, bool, str, str, bool]
    corpus: Corpus = field(compare=False)
    tokenizer: Any = field(compare=False)


@lru_cache(maxsize=32)
def _token_ids(wanted: _Wanted) -> dict[str, Tensor]:
    sha256, builtin, name, tokenizer, specials = wanted.key
    place = {
        "results_version": RESULTS_VERSION,
        "text": sha256,
        "documents": len(wanted.corpus.documents),
        "package_index": name if builtin else None,
        "tokenizer": tokenizer,
        "specials": specials,
        "versions": [transformers.__version__, tokenizers.__version__],
    }

    def make(folder: Path) -> None:
        texts = list(wanted.corpus.documents)
        rows: list[list[int]] = []
        for start in range(0, len(texts), BATCH):
            rows += wanted.tokenizer(texts[start : start + BATCH], add_special_tokens=specials)["input_ids"]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        write_tensors(folder / FILE, {"ids": ids, "lengths": lengths})

    found = load_file(cached_folder("tokens", place, make) / FILE)
    ids = torch.split(found["ids"].long(), found["lengths"].tolist())
    return dict(zip(wanted.corpus.documents, ids, strict=True))


_IDENTITIES: dict[int, tuple[Any, str]] = {}


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of a tokenizer's rules, or of its kind, vocabulary and settings where the rules cannot be read."""
    known = _IDENTITIES.get(id(tokenizer))
    if known is None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            rules = backend.to_str()
        else:
            settings = [(name, getattr(tokenizer, name, None)) for name in SETTINGS]
            rules = repr([type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), settings])
        known = (tokenizer, hashlib.sha256(rules.encode()).hexdigest())
        _IDENTITIES[id(tokenizer)] = known
    return known[1]
