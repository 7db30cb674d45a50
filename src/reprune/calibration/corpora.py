"""Sources that are texts: `web` and `domain`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reprune.calibration.corpus import BUILTIN_FILES, Corpus, corpus_at
from reprune.calibration.formats import Errors
from reprune.calibration.source import Document, TextContext, TextSource
from reprune.calibration.splits import documents_of


@dataclass(kw_only=True)
class CorpusSource(TextSource):
    """A source with a finite list of documents."""

    def corpus(self, key: str) -> Corpus:
        """The text itself; `key` is the config key an error names."""
        raise AssertionError("every corpus source has a corpus")

    def identity(self) -> dict[str, Any]:
        """Hash of the text."""
        return {"text": self.corpus("calibration").sha256}

    def check(self, key: str) -> None:
        """The text is there and can be read."""
        self.corpus(key)

    def documents(self, context: TextContext) -> Iterable[Document]:
        """The part's documents."""
        return documents_of(self.corpus(context.key), context.part, context.tokenizer, context.key)


@dataclass(kw_only=True)
class Web(CorpusSource):
    """C4, as it ships in a package-index wheel: 118 documents."""

    @property
    def name(self) -> str:
        """'web'."""
        return "web"

    def corpus(self, key: str) -> Corpus:
        """See CorpusSource."""
        return corpus_at("web", key)


@dataclass(kw_only=True)
class Domain(CorpusSource):
    """A text of one domain: `wiki`, `code`, `technical`, `stories`, `web`, or a path of the user's own.

    A path is a text file (documents are sections at blank lines), JSON lines or Parquet (`text_field`), each but Parquet
    also as .gz or .zst, or a folder of them. `errors=replace` puts U+FFFD where bytes are not UTF-8.
    """

    domain: str = "wiki"
    text_field: str = "text"
    errors: Errors = "strict"

    @property
    def name(self) -> str:
        """The domain, or the file's stem."""
        return self.domain if self.domain in BUILTIN_FILES else self.corpus("calibration").name

    def corpus(self, key: str) -> Corpus:
        """See CorpusSource."""
        return corpus_at(self.domain, f"{key}.domain", self.text_field, self.errors)
