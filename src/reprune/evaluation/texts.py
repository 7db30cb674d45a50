"""From an evaluator's texts to windows: joined and cut, or document by document with a stride."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reprune.calibration.corpus import corpus_at
from reprune.calibration.source import Bos, Document, TextSet
from reprune.calibration.splits import documents_of
from reprune.calibration.windows import resolve_bos
from reprune.errors import ConfigError, require_option, require_positive
from reprune.evaluation.field_texts import FieldText

Mode = Literal["joined", "documents"]
BLANK_LINE = "\n\n"


@dataclass(frozen=True, kw_only=True)
class ScoredSet(TextSet):
    """Windows of which not every token counts.

    `scored_NT` is bool [num_sequences, length − 1]: whether the token behind each position is scored. `document_N`,
    int64, numbers the documents. A window of a short document is filled up behind its end, where nothing is scored.
    """

    scored_NT: Tensor
    document_N: Tensor

    @property
    def key(self) -> str:
        """Hash of the token ids, and of what of them is scored."""
        more = self.scored_NT.numpy().tobytes() + self.document_N.numpy().tobytes()
        return hashlib.sha256(super().key.encode() + more).hexdigest()


def scored_of(text: TextSet) -> Tensor:
    """Which tokens count: bool [num_sequences, length − 1]; all but each window's first where nothing else is said."""
    if isinstance(text, ScoredSet):
        return text.scored_NT
    return torch.ones_like(text.tokens_NT[:, 1:], dtype=torch.bool)


def units_of(text: TextSet) -> Tensor:
    """What is drawn as a whole when windows are drawn anew, int64 [num_sequences]: a document, else a window."""
    return text.document_N if isinstance(text, ScoredSet) else torch.arange(len(text.tokens_NT))


def origins_of(texts: Mapping[str, TextSet]) -> list[str]:
    """Remarks on where texts of the hub really came from."""
    return [f"text '{name}': {text.source['used']}" for name, text in texts.items() if "used" in text.source]


@dataclass(frozen=True)
class _Opened:
    """A text before it is cut: its rows, its documents, what joins the rows, the most windows, where it is from."""

    place: str
    rows: Sequence[str]
    documents: Sequence[str]
    joiner: str
    max_windows: int | None
    source: dict[str, Any]


@dataclass(kw_only=True)
class OnTexts:
    """What evaluators on windows of text are configured with.

    `texts` maps names to package-index texts, of which only the evaluation part is used, to files, used whole, or to
    a FieldText. `mode=joined` joins a text's documents (by blank lines, or by what a FieldText says), tokenises once
    and cuts windows of `length` tokens without overlap, as the field does. `mode=documents` takes each document on its
    own: a window of `length` tokens slides over it by `stride` tokens (null: half a window), and every token is scored
    once, with at least `length − stride` tokens before it where the document has them; a document's first token only
    behind a BOS. `num_windows` takes the first windows, null all.
    """

    texts: Mapping[str, str | FieldText]
    mode: Mode = "joined"
    length: int = 256
    stride: int | None = None
    num_windows: int | None = None
    bos: Bos | None = None

    def __post_init__(self) -> None:
        require_positive(length=self.length, num_windows=self.num_windows, stride=self.stride)
        require_option("mode", self.mode, ["joined", "documents"])
        if self.length < 3:
            raise ConfigError(
                "length", "too short to predict anything", value=self.length, accepted="3 or more"
            )
        if self.stride is not None and self.mode == "joined":
            raise ConfigError(
                "stride",
                "joined windows do not overlap",
                value=self.stride,
                accepted="null, or mode=documents",
            )
        if not self.texts:
            raise ConfigError("texts", "no text is named", hint=f"+evaluation.{self.called}.texts.NAME=FILE")

    @property
    def called(self) -> str:
        """Its usual name in a suite."""
        return type(self).__name__.lower()

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """See Evaluator."""
        bos = resolve_bos(self.bos, tokenizer, key)
        return {name: self._windows(name, entry, tokenizer, bos, key) for name, entry in self.texts.items()}

    def _windows(self, name: str, entry: str | FieldText, tokenizer: Any, bos: Bos, key: str) -> TextSet:
        opened = _open(entry, tokenizer, f"{key}.texts.{name}")
        # Documents behind the last window are not used, but which ones those are is the tokenizer's business.
        used = tuple(dict.fromkeys(Document.of_text(text.strip()).id for text in opened.documents))
        source = {**opened.source, "mode": self.mode, "bos": bos}
        if self.mode == "joined":
            rows = self._joined(opened, tokenizer, bos, name, key)
            return TextSet(name, "evaluation", rows, used, {**source, "joiner": opened.joiner}, bos)
        rows, scored, numbers = self._by_document(opened, tokenizer, bos, name, key)
        source["stride"] = self.stride
        return ScoredSet(name, "evaluation", rows, used, source, bos, scored_NT=scored, document_N=numbers)

    def _joined(self, opened: _Opened, tokenizer: Any, bos: Bos, name: str, key: str) -> Tensor:
        ids = _ids(opened.joiner.join(opened.rows), tokenizer, bos)
        content = self.length - 1 if bos == "each_window" else self.length
        count = self._count(len(ids) // content, content, len(ids), opened, name, key)
        rows = ids[: count * content].reshape(count, content)
        return _headed(rows, tokenizer) if bos == "each_window" else rows

    def _by_document(
        self, opened: _Opened, tokenizer: Any, bos: Bos, name: str, key: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = int(bos == "each_window")
        content = self.length - head
        stride = max(1, content // 2) if self.stride is None else self.stride
        # Without a BOS a token needs another one in its window to be predicted from.
        if stride > content - 1 + head:
            raise ConfigError(
                f"{key}.stride", "leaves tokens without any before them", value=stride,
                accepted=f"at most {content - 1 + head} with windows of {self.length} tokens",
            )  # fmt: skip
        filler = tokenizer.eos_token_id or 0
        windows, scored, numbers, num_tokens = [], [], [], 0
        for number, text in enumerate(opened.documents):
            ids = _ids(text, tokenizer, bos)
            num_tokens += len(ids)
            for start, end, first in spans(len(ids), content, stride, 1 - head):
                window = torch.full((content,), filler, dtype=torch.long)
                window[: end - start] = ids[start:end]
                counts = torch.zeros(self.length - 1, dtype=torch.bool)
                counts[first - start + head - 1 : end - start + head - 1] = True
                windows.append(window)
                scored.append(counts)
                numbers.append(number)
        count = self._count(len(windows), content, num_tokens, opened, name, key)
        rows = torch.stack(windows[:count])
        return (
            _headed(rows, tokenizer) if head else rows,
            torch.stack(scored[:count]),
            torch.tensor(numbers[:count]),
        )

    def _count(self, there: int, content: int, num_tokens: int, opened: _Opened, name: str, key: str) -> int:
        """How many windows are taken; ConfigError where the text has not as many as are asked for."""
        asked = there if self.num_windows is None else self.num_windows
        most = asked if opened.max_windows is None else min(asked, opened.max_windows)
        if there < max(1, self.num_windows or 1):
            raise ConfigError(
                f"{key}.texts.{name}",
                f"{max(1, asked)} windows of {content} tokens are asked for, this text has {there}",
                value=f"{opened.place}: {len(opened.documents)} documents, {num_tokens:,} tokens",
                hint=f"set {key}.num_windows to at most {there}, or null for all"
                if there
                else f"lower {key}.length",
            )
        return most


def spans(num_tokens: int, content: int, stride: int, first: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a document: start, end, and the first token scored; every token from `first` on is scored once."""
    end = min(content, num_tokens)
    if end > first:
        yield 0, end, first
    while end < num_tokens:
        scored = end
        end = min(end + stride, num_tokens)
        yield max(0, end - content), end, scored


def _open(entry: str | FieldText, tokenizer: Any, key: str) -> _Opened:
    if isinstance(entry, FieldText):
        found = entry.read(key)
        names = ("dataset", "config", "data_split", "revision")
        source = {"used": found.used, **{name: getattr(entry, name) for name in names}}
        return _Opened(entry.dataset, found.rows, found.documents, entry.joiner, entry.max_windows, source)
    corpus = corpus_at(entry, key)
    documents: Sequence[str] = corpus.documents
    if corpus.builtin:
        documents = [it.text or "" for it in documents_of(corpus, "evaluation", tokenizer, key)]
    return _Opened(entry, documents, documents, BLANK_LINE, None, {"text": corpus.sha256})


def _ids(text: str, tokenizer: Any, bos: Bos) -> Tensor:
    ids = tokenizer(text, add_special_tokens=bos == "as_tokenised")["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _headed(rows: Tensor, tokenizer: Any) -> Tensor:
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
