"""What the model writes by itself: repetition, diversity, its own likelihood, how near it stays to the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor

from reprune.calibration.corpus import corpus_at
from reprune.calibration.source import Bos, Document, TextSet
from reprune.calibration.splits import documents_of
from reprune.calibration.windows import resolve_bos
from reprune.errors import ConfigError, RunError, require_nonnegative, require_positive
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.text_statistics import (
    DISTINCT_TOKENS,
    distinct,
    mean_over_prompts,
    perplexity,
    repetition,
)
from reprune.evaluation.writing import Written, check_fits, check_room, check_tokenizer, tokens_rouge_l, write
from reprune.files import write_atomically
from reprune.seeding import generator

FILE = "continuations.parquet"
Mode = Literal["greedy", "sampled"]
PLACE = ["text", "mode", "prompt", "sample"]


@dataclass(kw_only=True)
class Continuations:
    """Continuations of the first `prompt_length` tokens of the first `num_prompts` documents that are longer than that.

    `texts` maps names to package-index texts, of which only the evaluation part is used, or to files, used whole. Behind
    each prompt `num_tokens` tokens, fewer where the end-of-text token comes: once greedily, and `num_samples` times drawn
    at `temperature`, each from a stream named by `seed`, document and number of the sample. `bos` as for windows: with
    each_window the prompt begins with BOS.

    Metrics are generation/TEXT/MODE/…, MODE greedy or sampled, with `_stderr` over prompts (see text_statistics):
    `repetition` (4-grams that occurred before in the same continuation), `distinct_1`, `_2`, `_3`, `self_perplexity` (the
    model's own, at temperature 1, of what it wrote given the prompt; the end-of-text token counts where it came),
    `length` (tokens), `ended` (share with an end-of-text token), and beside a dense model `rouge_l_dense`: ROUGE-L F1 of
    the token ids against what the dense model wrote there.

    `continuations.parquet` keeps a row a continuation: text, mode, prompt, sample (both from 0), document, prompt_text,
    continuation, tokens, ended, loss (nats).
    """

    writes: ClassVar[bool] = True

    texts: Mapping[str, str]
    num_prompts: int = 64
    prompt_length: int = 32
    num_tokens: int = 128
    num_samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 16
    bos: Bos | None = None

    def __post_init__(self) -> None:
        require_positive(
            num_prompts=self.num_prompts, prompt_length=self.prompt_length, num_tokens=self.num_tokens,
            temperature=self.temperature, batch_size=self.batch_size,
        )  # fmt: skip
        require_nonnegative(num_samples=self.num_samples, seed=self.seed)
        if self.prompt_length < 2:
            raise ConfigError("prompt_length", "too short", value=self.prompt_length, accepted="2 or more")
        if not self.texts:
            raise ConfigError("texts", "no text is named", hint="+evaluation.generation.texts.NAME=FILE")

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """See Evaluator: the prompts."""
        check_tokenizer(tokenizer, key)
        bos = resolve_bos(self.bos, tokenizer, key)
        return {name: self._prompts(name, place, tokenizer, bos, key) for name, place in self.texts.items()}

    def _prompts(self, name: str, place: str, tokenizer: Any, bos: Bos, key: str) -> TextSet:
        place_key = f"{key}.texts.{name}"
        corpus = corpus_at(place, place_key)
        documents = (
            documents_of(corpus, "evaluation", tokenizer, place_key)
            if corpus.builtin
            else [Document.of_text(text) for text in corpus.documents]
        )
        head = [tokenizer.bos_token_id] if bos == "each_window" else []
        rows, used = [], []
        for document in documents:
            ids = head + tokenizer(document.text or "", add_special_tokens=bos == "as_tokenised")["input_ids"]
            if len(ids) > self.prompt_length:
                rows.append(ids[: self.prompt_length])
                used.append(document.id)
        if len(rows) < self.num_prompts:
            raise ConfigError(
                place_key,
                f"{self.num_prompts} prompts are asked for; {len(rows)} documents of this text are longer than "
                f"{self.prompt_length} tokens",
                value=f"{place}: {len(documents)} documents",
                hint=f"set {key}.num_prompts to at most {len(rows)}"
                if rows
                else f"lower {key}.prompt_length",
            )
        tokens = torch.tensor(rows[: self.num_prompts])
        ids_used = tuple(used[: self.num_prompts])
        return TextSet(name, "evaluation", tokens, ids_used, {"text": corpus.sha256, "bos": bos}, bos)

    def check_room(self, longest: int, key: str) -> None:
        """ConfigError where prompt and continuation are longer than a model's context of `longest` tokens."""
        check_room(self.prompt_length, self.num_tokens, longest, key)

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """See Evaluator. The batch is part of it: rounding may change which of two near tokens is chosen."""
        names = ("num_tokens", "num_samples", "temperature", "seed", "batch_size")
        return {
            "evaluator": "continuations",
            # Streams are named by documents: the same tokens of other documents draw others.
            "texts": {name: [text.key, list(text.document_ids)] for name, text in texts.items()},
            **{name: getattr(self, name) for name in names},
        }

    def evaluate(self, task: Task) -> Outcome:
        """See Evaluator; a text on which nothing can be written has failed, RunError when all have."""
        check_fits(task.model, self.prompt_length, self.num_tokens)
        outcome, frames = Outcome({}), []
        total = sum(len(text.tokens_NT) for text in task.texts.values()) * (1 + self.num_samples)
        done = 0
        with task.model.holding(task.model.model):
            for name, text in task.texts.items():
                try:
                    frame = self._written(task, name, text, outcome.notes, done, total)
                    outcome.metrics.update(_metrics(frame, name))
                    frames.append(frame)
                except (RunError, OverflowError) as error:
                    outcome.failed[f"generation/{name}"] = str(error)
                done += len(text.tokens_NT) * (1 + self.num_samples)
        if not frames:
            raise RunError("; ".join(outcome.failed.values()))
        rows = pd.concat(frames, ignore_index=True)
        write_atomically(task.folder / FILE, lambda path: rows.to_parquet(path, index=False))
        if task.dense is not None:
            outcome.metrics.update(_beside(rows, task.dense / FILE))
        return outcome

    def _written(
        self, task: Task, name: str, text: TextSet, notes: list[str], done: int, total: int
    ) -> pd.DataFrame:
        count, tokenizer = len(text.tokens_NT), task.model.tokenizer
        rows: list[dict[str, Any]] = []
        for turn in range(1 + self.num_samples):
            mode: Mode = "sampled" if turn else "greedy"
            sample = max(0, turn - 1)

            def stream_of(place: int, sample: int = sample) -> torch.Generator:
                return generator(self.seed, "continuations", text.document_ids[place], sample)

            def told(within: int, before: int = done + turn * count) -> None:
                task.on_progress(before + within, total)

            found = write(
                task.model,
                list(text.tokens_NT),
                self.num_tokens,
                self.batch_size,
                notes,
                f"generation on '{name}'",
                stream_of=stream_of if turn else None,
                temperature=self.temperature,
                on_progress=told,
            )
            for prompt, (ids, one) in enumerate(zip(text.tokens_NT, found, strict=True)):
                place = {"text": name, "mode": mode, "prompt": prompt, "sample": sample}
                rows.append({**place, "document": text.document_ids[prompt], **_row(ids, one, tokenizer)})
        return pd.DataFrame(rows)


def _row(prompt: Tensor, one: Written, tokenizer: Any) -> dict[str, Any]:
    return {
        "prompt_text": tokenizer.decode(prompt),
        "continuation": tokenizer.decode(one.tokens),
        "tokens": one.tokens,
        "ended": one.ended,
        "loss": one.loss,
    }


def _metrics(frame: pd.DataFrame, text: str) -> dict[str, float]:
    """The metrics of one text's rows that need no other model."""
    found: dict[str, float] = {}
    for mode, rows in frame.groupby("mode", sort=False):
        name, prompts = f"generation/{text}/{mode}", rows["prompt"].tolist()
        tokens: list[Sequence[int]] = rows["tokens"].tolist()
        lengths = [len(row) for row in tokens]
        choices = [length + ended for length, ended in zip(lengths, rows["ended"], strict=True)]
        found |= repetition(f"{name}/repetition", tokens, prompts)
        for size in DISTINCT_TOKENS:
            found |= distinct(f"{name}/distinct_{size}", tokens, prompts, size)
        found |= perplexity(f"{name}/self_perplexity", rows["loss"].tolist(), choices, prompts)
        found |= mean_over_prompts(f"{name}/length", lengths, prompts)
        found |= mean_over_prompts(f"{name}/ended", rows["ended"].astype(float).tolist(), prompts)
    assert all(math.isfinite(value) for value in found.values())
    return found


def _beside(rows: pd.DataFrame, dense: Path) -> dict[str, float]:
    """ROUGE-L against the dense model's continuations, for the texts that it has, too."""
    there = pd.read_parquet(dense)[[*PLACE, "tokens"]]
    both = rows.merge(there, on=PLACE, validate="one_to_one", suffixes=("", "_dense"))
    both["score"] = [
        tokens_rouge_l(list(one), list(other))
        for one, other in zip(both["tokens"], both["tokens_dense"], strict=True)
    ]
    found: dict[str, float] = {}
    for (text, mode), of_mode in both.groupby(["text", "mode"], sort=False):
        name = f"generation/{text}/{mode}/rouge_l_dense"
        found |= mean_over_prompts(name, of_mode["score"].tolist(), of_mode["prompt"].tolist())
    return found
