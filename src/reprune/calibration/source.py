"""The contract of a text source, and what every source is configured with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from reprune.calibration.corpus import Corpus
from reprune.errors import ConfigError, require_nonnegative, require_positive
from reprune.model.loading import LoadedModel

Part = Literal["calibration", "validation", "probe", "evaluation"]
Role = Part
Bos = Literal["each_window", "as_tokenised"]
Cut = Literal["crop", "pack", "first"]
Selection = Literal["random", "longest", "perplexity"]


@dataclass(frozen=True)
class Document:
    """One document: a hash of its content, and its text or its token ids (int64 [length]).

    A window that is taken as it is may hold several documents: `positions` (int64 [length]) then begins anew at each.
    `corpus` is the text it is a part of, whose token ids runs share.
    """

    id: str
    text: str | None = None
    tokens: Tensor | None = None
    positions: Tensor | None = None
    corpus: Corpus | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of_text(text: str, corpus: Corpus | None = None) -> Document:
        """A document with a text, by itself or of a corpus."""
        return Document(hashlib.sha256(text.encode()).hexdigest()[:16], text=text, corpus=corpus)

    @staticmethod
    def of_tokens(tokens: Tensor) -> Document:
        """A document with token ids."""
        return Document(hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16], tokens=tokens)


@dataclass(frozen=True)
class TextContext:
    """What a source may need to produce documents.

    `model` is there only for sources that set `needs_model`. `generator` is the source's own stream, another one for
    every `set` of an endless source.
    """

    tokenizer: Any
    model: LoadedModel | None
    part: Part
    length: int
    generator: torch.Generator
    seed: int
    key: str
    set: int = 0


@dataclass(kw_only=True)
class TextSource:
    """What every option of the group `calibration` has: how many windows of how many tokens.

    `bos=each_window` puts the BOS token at the head of every window, `as_tokenised` leaves it where the tokenizer
    puts it, null takes `each_window` for tokenizers that add BOS. `cut=crop` takes windows inside documents,
    `cut=first` the first tokens of each document, `cut=pack` joins documents with the end-of-text token. `split` takes
    another part of the documents than the one that belongs to the role. Packed documents do not see each other: positions
    begin anew at each, and where windows begin with BOS so does every document in them; `cross_documents=true` makes
    one text of the window instead, in which attention goes across.

    `set` counts disjoint sets of `num_sequences` windows of one source, from 0. `selection` takes the windows as they
    come (`random`), those of the longest documents, or those whose perplexity under the dense model lies between the
    two quantiles of `band`, out of `pool` windows (null: of all there are).
    """

    num_sequences: int | None = 32
    length: int | None = 256
    bos: Bos | None = None
    split: Part | None = None
    cut: Cut = "crop"
    cross_documents: bool = False
    set: int = 0
    selection: Selection = "random"
    pool: int | None = None
    band: Sequence[float] = (0.25, 0.75)

    endless: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    """Whether its documents are windows already, to be taken as they are and in their order."""

    def __post_init__(self) -> None:
        require_positive(num_sequences=self.num_sequences, length=self.length, pool=self.pool)
        self._check_choice()

    def _check_choice(self) -> None:
        """ConfigError for sets and selections that cannot be made."""
        require_nonnegative(set=self.set)
        if (self.set or self.selection != "random") and self.num_sequences is None:
            raise ConfigError(
                "num_sequences",
                "a set or a selection needs a count",
                value=f"num_sequences=null, set={self.set}, selection={self.selection}",
                accepted="a number of windows",
            )
        if (self.set or self.selection != "random") and self.exact:
            raise ConfigError(
                "selection" if self.selection != "random" else "set",
                "the windows of this source are exact: nothing is chosen",
                value=self.selection if self.selection != "random" else self.set,
                accepted="selection=random set=0",
            )
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] <= 1:
            raise ConfigError("band", "two quantiles are needed", value=list(self.band), accepted="0 ≤ low < high ≤ 1")  # fmt: skip
        if self.pool is not None and self.selection == "random":
            raise ConfigError("pool", "belongs to another selection", value=self.pool, accepted="null with selection=random")  # fmt: skip
        if self.selection != "random" and self.endless and self.pool is None:
            raise ConfigError("pool", "this source has no end, so a selection needs a number", value="null", accepted="a number of windows")  # fmt: skip

    @property
    def needs_model(self) -> bool:
        """Whether the windows can be cut only once the model is loaded."""
        return self.selection == "perplexity"

    @property
    def keeps_apart(self) -> bool:
        """Whether a window may hold several documents that do not see each other."""
        return self.cut == "pack" and not self.cross_documents and not self.exact

    @property
    def chosen(self) -> dict[str, Any]:
        """What beside seed, count and size decides which windows these are."""
        choice: dict[str, Any] = {"set": self.set} if self.set else {}
        choice |= {"documents": "apart"} if self.keeps_apart else {}
        if self.selection != "random":
            choice |= {"selection": self.selection, "pool": self.pool}
            choice |= {"band": list(self.band)} if self.selection == "perplexity" else {}
        return choice

    @property
    def name(self) -> str:
        """A short name for records."""
        raise AssertionError("every source names itself")

    def identity(self) -> dict[str, Any]:
        """What makes the text this text: recipe and file hashes, not seeds or window sizes."""
        raise AssertionError("every source identifies itself")

    def check(self, key: str) -> None:
        """Raise ConfigError for files that are missing or unreadable, before any weight is loaded."""

    def check_tokenizer(self, tokenizer: Any, key: str) -> None:
        """Raise ConfigError for a tokenizer that lacks a token this source needs, before any weight is loaded."""

    def check_room(self, max_length: int | None, tokenizer: Any, key: str) -> None:
        """Raise ConfigError for texts that do not fit the model's context, before any weight is loaded."""

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
    """Windows of token ids with a name and a role: int64 [num_sequences, length].

    `positions_NT`, of the same shape, begins anew at every document of a window; None where each window is one text.
    """

    name: str
    role: Role
    tokens_NT: Tensor
    document_ids: Sequence[str]
    source: dict[str, Any]
    bos: Bos
    positions_NT: Tensor | None = None

    @property
    def key(self) -> str:
        """Hash of the token ids, and of the positions where they begin anew."""
        content = str(tuple(self.tokens_NT.shape)).encode() + self.tokens_NT.numpy().tobytes()
        if self.positions_NT is not None:
            content += self.positions_NT.contiguous().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()
