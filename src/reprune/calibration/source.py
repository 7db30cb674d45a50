"""The contract of a text source, and what every source is configured with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from reprune.errors import require_positive
from reprune.model.loading import LoadedModel

Part = Literal["calibration", "validation", "probe", "evaluation"]
Role = Part
Bos = Literal["each_window", "as_tokenised"]


@dataclass(frozen=True)
class Document:
    """One document: a hash of its content, and its text or its token ids (int64 [length])."""

    id: str
    text: str | None = None
    tokens: Tensor | None = None

    @staticmethod
    def of_text(text: str) -> Document:
        """A document with a text."""
        return Document(hashlib.sha256(text.encode()).hexdigest()[:16], text=text)

    @staticmethod
    def of_tokens(tokens: Tensor) -> Document:
        """A document with token ids."""
        return Document(hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16], tokens=tokens)


@dataclass(frozen=True)
class TextContext:
    """What a source may need to produce documents.

    `model` is there only for sources that set `needs_model`. `generator` is the source's own stream.
    """

    tokenizer: Any
    model: LoadedModel | None
    part: Part
    length: int
    generator: torch.Generator
    seed: int
    key: str


@dataclass(kw_only=True)
class TextSource:
    """What every option of the group `calibration` has: how many windows of how many tokens.

    `bos=each_window` puts the BOS token at the head of every window, `as_tokenised` leaves it where the tokenizer
    puts it, null takes `each_window` for tokenizers that add BOS. `cut=crop` takes windows inside documents,
    `cut=pack` joins documents with the end-of-text token. `split` takes another part of the documents than the
    one that belongs to the role.
    """

    num_sequences: int | None = 32
    length: int | None = 256
    bos: Bos | None = None
    split: Part | None = None
    cut: Literal["crop", "pack"] = "crop"

    needs_model: ClassVar[bool] = False
    endless: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    """Whether its documents are windows already, to be taken as they are and in their order."""

    def __post_init__(self) -> None:
        require_positive(num_sequences=self.num_sequences, length=self.length)

    @property
    def name(self) -> str:
        """A short name for records."""
        raise AssertionError("every source names itself")

    def identity(self) -> dict[str, Any]:
        """What makes the text this text: recipe and file hashes, not seeds or window sizes."""
        raise AssertionError("every source identifies itself")

    def check(self, key: str) -> None:
        """Raise ConfigError for files that are missing or unreadable, before any weight is loaded."""

    def documents(self, context: TextContext) -> Iterable[Document]:
        """The documents of `context.part`, in an order that does not depend on the seed unless drawn from it."""
        raise AssertionError("every source yields documents")


class CalibrationSource(Protocol):
    """What the pipeline asks of a source."""

    def identity(self) -> dict[str, Any]:
        """See TextSource."""
        ...

    def documents(self, context: TextContext) -> Iterable[Document]:
        """See TextSource."""
        ...


@dataclass(frozen=True)
class TextSet:
    """Windows of token ids with a name and a role: int64 [num_sequences, length]."""

    name: str
    role: Role
    tokens_NT: Tensor
    document_ids: Sequence[str]
    source: dict[str, Any]
    bos: Bos

    @property
    def key(self) -> str:
        """Hash of the token ids."""
        shape = str(tuple(self.tokens_NT.shape)).encode()
        return hashlib.sha256(shape + self.tokens_NT.numpy().tobytes()).hexdigest()
