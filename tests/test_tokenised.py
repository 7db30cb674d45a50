"""Token ids that runs share: made once, those of the tokenizer, never another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import write_documents
from reprune.calibration import tokenised
from reprune.calibration.corpora import Domain
from reprune.calibration.corpus import corpus_of
from reprune.calibration.tokenised import token_ids
from reprune.calibration.windows import cut_windows
from reprune.model.tiny import byte_tokenizer

TEXTS = ["one text", "another, longer than that", "ünïcödé", "x"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    tokenised._token_ids.cache_clear()


class _Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.seen = tokenizer, 0

    def __call__(self, texts: list[str], **more: Any) -> Any:
        self.seen += len(texts)
        return self.tokenizer(texts, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("specials", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
def test_they_are_the_tokenizers_and_made_once(specials: bool, add_bos: bool) -> None:
    """Catches rows that slip by one, special tokens of another setting, and texts that are tokenised again."""
    corpus = corpus_of("mine", TEXTS)
    tokenizer = _Counting(byte_tokenizer(add_bos=add_bos))
    expected = [tokenizer.tokenizer(text, add_special_tokens=specials)["input_ids"] for text in TEXTS]
    for _ in range(2):
        found = token_ids(corpus, tokenizer, specials)
        assert list(found) == TEXTS
        assert [row.tolist() for row in found.values()] == expected
        assert all(row.dtype == torch.int64 for row in found.values())
        tokenised._token_ids.cache_clear()
    assert tokenizer.seen == len(TEXTS)


def test_nothing_is_mixed_up() -> None:
    """Catches a key without the text, the tokenizer or the special tokens."""
    plain, with_bos = byte_tokenizer(add_bos=False), byte_tokenizer(add_bos=True)
    first, second = corpus_of("mine", TEXTS), corpus_of("mine", [*TEXTS, "more"])
    wanted = [
        (first, plain, True),
        (first, with_bos, True),
        (first, with_bos, False),
        (second, with_bos, True),
    ]
    for _ in range(2):
        for corpus, tokenizer, specials in wanted:
            found = token_ids(corpus, tokenizer, specials)
            for text in corpus.documents:
                direct = tokenizer(text, add_special_tokens=specials)["input_ids"]
                assert found[text].tolist() == direct
        tokenised._token_ids.cache_clear()


def test_windows_are_cut_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sweep whose runs tokenise the same text one after the other."""
    path = tmp_path / "mine.jsonl"
    write_documents(path)
    tokenizer = byte_tokenizer(add_bos=True)
    sources = [
        Domain(domain=str(path), num_sequences=4, length=16, set=number, cut="crop") for number in (0, 1)
    ]

    def cut(source: Domain) -> torch.Tensor:
        return cut_windows(
            source, role="probe", tokenizer=tokenizer, model=None, seed=0, key="calibration"
        ).tokens_NT

    first = cut(sources[0])
    tokenised._token_ids.cache_clear()

    call = type(tokenizer).__call__

    def never(self: Any, text: Any, **more: Any) -> Any:
        # Whether it adds BOS is asked with a letter.
        assert len(text) < 2, "tokenised again"
        return call(self, text, **more)

    monkeypatch.setattr(type(tokenizer), "__call__", never)
    assert torch.equal(cut(sources[0]), first)
    assert not torch.equal(cut(sources[1]), first)
