"""Summaries of the user's documents: ROUGE against a reference, lexical overlap with the source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from torch import Tensor

from reprune.calibration.formats import PACKED, ROWS, documents_in
from reprune.calibration.source import Document, TextSet
from reprune.errors import ConfigError, RunError, require_positive
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.text_statistics import OVERLAP_WORDS, mean_over_prompts, overlap
from reprune.evaluation.writing import check_fits, check_tokenizer, tokens_rouge_l, write
from reprune.files import write_atomically

FILE = "summaries.parquet"
PLACE = "{document}"
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
SCORES = (*ROUGE, *(f"overlap_{size}" for size in OVERLAP_WORDS), "length", "ended", "rouge_l_dense")
PROMPTS = {
    name: f"{instruction}:\n\n{PLACE}\n\nThe summary is:"
    for name, instruction in {
        "paragraph": "Summarize in a single short paragraph the context below",
        "sentences": "Summarize in a couple of sentences the document below",
        "short": "Give me a short summary of the below",
    }.items()
}
"""The three prompts of Chrysostomou et al. (2024, arXiv 2311.09335)."""


@dataclass(frozen=True)
class SourceSet(TextSet):
    """Documents to summarise, each cut so that every prompt holds it.

    Rows hold a document's tokens, filled up with the same tokens again: filler is then no text of its own that other
    texts could repeat. `sources` and `references` are the texts, `num_cut` says how many documents were cut.
    """

    sources: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    num_cut: int = 0

    @property
    def key(self) -> str:
        """Hash of the texts and their references."""
        content = [*self.sources, *self.references, *self.document_ids]
        return hashlib.sha256("\0".join(content).encode()).hexdigest()


@dataclass(kw_only=True)
class Summaries:
    """Greedy summaries of the first `num_documents` documents of a file, under each of several prompts.

    `path` is a file of rows (JSON lines, JSON, Parquet) with the fields `source_field` and `reference_field`. `prompts`
    maps names to texts with {document} in them. A prompt and the `num_tokens` behind it take at most `length` tokens:
    longer documents lose their end. A summary ends with the end-of-text token.

    Metrics are summaries/PROMPT/…, with PROMPT `all` for the mean over prompts of each document, and `_stderr` over
    documents: `rouge_1`, `rouge_2`, `rouge_l` (F1 of the package rouge_score against the reference; lower-cased words of
    letters a-z and digits, Porter-stemmed if `stemmer`), `overlap_1`, `_2`, `_3` (the share of the summary's n-grams of
    those words, not stemmed, that its source has: text_statistics.overlap; summaries too short for one do not count),
    `length` (tokens), `ended`, and beside a dense model `rouge_l_dense` (token ids against the dense model's summary).

    `summaries.parquet` keeps a row a prompt and document: prompt, document (its place, from 0), document_id, source (as
    the model saw it), reference, summary, tokens, ended, loss (nats), and the scores.
    """

    writes: ClassVar[bool] = True

    path: str
    source_field: str = "document"
    reference_field: str = "summary"
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(PROMPTS))
    num_documents: int | None = 100
    length: int = 2048
    num_tokens: int = 128
    stemmer: bool = True
    batch_size: int = 8

    def __post_init__(self) -> None:
        require_positive(
            num_documents=self.num_documents, length=self.length, num_tokens=self.num_tokens,
            batch_size=self.batch_size,
        )  # fmt: skip
        if not self.prompts:
            raise ConfigError("prompts", "no prompt is named")
        for name, prompt in self.prompts.items():
            if prompt.count(PLACE) != 1 or name == "all":
                raise ConfigError(
                    f"prompts.{name}", "not a prompt", value=prompt, accepted=f"a text with {PLACE} once; not named 'all'"
                )  # fmt: skip

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """See Evaluator: the documents."""
        check_tokenizer(tokenizer, key)
        pairs = self._pairs(key)
        room = self.length - self.num_tokens
        empty = max(len(self._ids(prompt, "", tokenizer)) for prompt in self.prompts.values())
        if empty >= room:
            raise ConfigError(
                f"{key}.length", "leaves no room for a document", value=self.length,
                accepted=f"more than {empty + self.num_tokens}: the longest prompt and num_tokens",
            )  # fmt: skip
        sources = [self._shortened(source, tokenizer, room) for source, _ in pairs]
        if not all(sources):
            raise ConfigError(
                f"{key}.length", "leaves next to no room for a document", value=self.length,
                hint=f"raise it, or lower {key}.num_tokens",
            )  # fmt: skip
        rows = [tokenizer(source, add_special_tokens=False)["input_ids"] for source in sources]
        width = max(map(len, rows))
        filled = torch.tensor([(row * -(-width // len(row)))[:width] for row in rows])
        return {
            "documents": SourceSet(
                "documents",
                "evaluation",
                filled,
                tuple(Document.of_text(source).id for source, _ in pairs),
                {"path": Path(self.path).name},
                "as_tokenised",
                sources=tuple(sources),
                references=tuple(reference for _, reference in pairs),
                num_cut=sum(one != whole for one, (whole, _) in zip(sources, pairs, strict=True)),
            )
        }

    def _pairs(self, key: str) -> list[tuple[str, str]]:
        """Documents and their references, each with text in it."""
        path = Path(self.path)
        if not path.is_file():
            raise ConfigError(f"{key}.path", "no such file", value=path)
        if not any(path.name.removesuffix(packed).endswith(ROWS) for packed in ("", *PACKED)):
            raise ConfigError(f"{key}.path", "this file has no rows", value=path, accepted=", ".join(ROWS))
        fields = (self.source_field, self.reference_field)
        columns = [documents_in(path, f"{key}.path", name, "strict", whole=False) for name in fields]
        # Values that are not there were passed over, perhaps in other rows of the one than of the other.
        if path.suffix == ".parquet" and pd.read_parquet(path, columns=[*fields]).isna().any(axis=None):
            raise ConfigError(
                f"{key}.path", "some rows have no document or no summary", value=path,
                accepted=f"a text in '{self.source_field}' and in '{self.reference_field}' in every row",
            )  # fmt: skip
        stripped = [(one.strip(), other.strip()) for one, other in zip(*columns, strict=True)]
        pairs = [pair for pair in stripped if all(pair)]
        wanted = len(pairs) if self.num_documents is None else self.num_documents
        if len(pairs) < max(1, wanted):
            raise ConfigError(
                f"{key}.num_documents", f"this file has {len(pairs)} documents with a summary", value=wanted,
                hint=f"{key}.num_documents=null takes all there are",
            )  # fmt: skip
        return pairs[:wanted]

    def _ids(self, prompt: str, source: str, tokenizer: Any) -> Tensor:
        return torch.tensor(tokenizer(prompt.replace(PLACE, source))["input_ids"])

    def _shortened(self, source: str, tokenizer: Any, room: int) -> str:
        """The document without as much of its end as keeps every prompt within `room` tokens."""

        def fits(characters: int) -> bool:
            shown = source[:characters].rstrip()
            return all(len(self._ids(one, shown, tokenizer)) <= room for one in self.prompts.values())

        if fits(len(source)):
            return source
        low, high = 0, len(source)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return source[:low].rstrip()

    def check_room(self, longest: int, key: str) -> None:
        """ConfigError where `length` is longer than a model's context of `longest` tokens."""
        if self.length > longest:
            raise ConfigError(
                f"{key}.length", "longer than the model's context", value=self.length, accepted=f"at most {longest}"
            )  # fmt: skip

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """See Evaluator. The batch is part of it: rounding may change which of two near tokens is chosen."""
        return {
            "evaluator": "summaries",
            "texts": {name: text.key for name, text in texts.items()},
            "prompts": dict(self.prompts),
            **{name: getattr(self, name) for name in ("num_tokens", "stemmer", "batch_size")},
            "rouge_score": version("rouge_score"),
        }

    def evaluate(self, task: Task) -> Outcome:
        """See Evaluator; a prompt under which nothing can be written has failed, RunError when all have."""
        text = task.texts["documents"]
        assert isinstance(text, SourceSet)
        check_fits(task.model, self.length - self.num_tokens, self.num_tokens)
        outcome, frames = Outcome({}), []
        if text.num_cut:
            outcome.notes.append(
                f"summaries: {text.num_cut} of {len(text.sources)} documents were cut to fit"
            )
        with task.model.holding(task.model.model):
            for turn, name in enumerate(self.prompts):
                try:
                    frames.append(self._summaries(task, text, name, turn, outcome.notes))
                except RunError as error:
                    outcome.failed[f"summaries/{name}"] = str(error)
        if not frames:
            raise RunError("; ".join(outcome.failed.values()))
        rows = pd.concat(frames, ignore_index=True)
        if task.dense is not None:
            there = pd.read_parquet(task.dense / FILE)[["prompt", "document", "tokens"]]
            keys = ["prompt", "document"]
            rows = rows.merge(there, "left", keys, validate="one_to_one", suffixes=("", "_dense"))
            pairs = zip(rows["tokens"], rows.pop("tokens_dense"), strict=True)
            rows["rouge_l_dense"] = [
                # What the dense model has not is not a list but NaN.
                None if isinstance(dense, float) else tokens_rouge_l(list(one), list(dense))
                for one, dense in pairs
            ]
        write_atomically(task.folder / FILE, lambda path: rows.to_parquet(path, index=False))
        for name in self.prompts:
            outcome.metrics.update(_metrics(name, rows[rows["prompt"] == name]))
        # Of fewer prompts it would be another mean.
        if not outcome.failed:
            outcome.metrics.update(_metrics("all", rows))
        return outcome

    def _summaries(self, task: Task, text: SourceSet, name: str, turn: int, notes: list[str]) -> pd.DataFrame:
        tokenizer, count = task.model.tokenizer, len(text.sources)
        prompts = [self._ids(self.prompts[name], source, tokenizer) for source in text.sources]

        def told(done: int) -> None:
            task.on_progress(turn * count + done, len(self.prompts) * count)

        # Together with others of its length a prompt needs the least padding.
        order = sorted(range(count), key=lambda place: len(prompts[place]))
        found = write(
            task.model, [prompts[place] for place in order], self.num_tokens, self.batch_size, notes,
            f"summaries with prompt '{name}'", on_progress=told,
        )  # fmt: skip
        written = dict(zip(order, found, strict=True))
        scorer = RougeScorer([*ROUGE.values()], use_stemmer=self.stemmer)
        rows = []
        for place in range(count):
            one = written[place]
            summary = tokenizer.decode(one.tokens, skip_special_tokens=True).strip()
            scores = scorer.score(text.references[place], summary)
            words = [tokenize(of, None) for of in (summary, text.sources[place])]
            rows.append(
                {
                    "prompt": name,
                    "document": place,
                    "document_id": text.document_ids[place],
                    "source": text.sources[place],
                    "reference": text.references[place],
                    "summary": summary,
                    "tokens": one.tokens,
                    "ended": one.ended,
                    "loss": one.loss,
                    "length": len(one.tokens),
                    **{metric: scores[kind].fmeasure for metric, kind in ROUGE.items()},
                    **{f"overlap_{size}": overlap(words[0], words[1], size) for size in OVERLAP_WORDS},
                }
            )
        return pd.DataFrame(rows)


def _metrics(prompt: str, rows: pd.DataFrame) -> dict[str, float]:
    """Means of the rows over documents, with standard errors; what a row does not have does not count."""
    found: dict[str, float] = {}
    for metric in SCORES:
        if metric in rows:
            there = rows[rows[metric].notna()]
            values = there[metric].astype(float).tolist()
            found |= mean_over_prompts(f"summaries/{prompt}/{metric}", values, there["document"].tolist())
    return found
