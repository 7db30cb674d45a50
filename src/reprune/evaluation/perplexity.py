"""Perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from reprune.calibration.corpus import corpus_at
from reprune.calibration.source import Bos, Document, TextSet
from reprune.calibration.splits import documents_of
from reprune.calibration.windows import resolve_bos
from reprune.errors import ConfigError, RunError, require_positive
from reprune.evaluation.batches import in_batches
from reprune.evaluation.contract import Outcome, Task
from reprune.model.likelihood import rows_a_pass, token_losses

MAX_MEAN_LOSS = 700


@dataclass(kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token, over the first `num_windows` windows of each text.

    A text's documents are joined by blank lines, tokenised once and cut into windows of `length` tokens without
    overlap, as the field does; null takes every window. `texts` maps names to package-index texts, of which only the
    evaluation part is used, or to files, used whole.
    """

    texts: Mapping[str, str]
    length: int = 256
    num_windows: int | None = None
    bos: Bos | None = None

    def __post_init__(self) -> None:
        require_positive(length=self.length, num_windows=self.num_windows)
        if self.length < 3:
            raise ConfigError(
                "length", "too short to predict anything", value=self.length, accepted="3 or more"
            )
        if not self.texts:
            raise ConfigError("texts", "no text is named", hint="+evaluation.perplexity.texts.NAME=FILE")

    def cut(self, tokenizer: Any, key: str) -> dict[str, TextSet]:
        """See Evaluator."""
        bos = resolve_bos(self.bos, tokenizer, key)
        return {name: self._windows(name, place, tokenizer, bos, key) for name, place in self.texts.items()}

    def _windows(self, name: str, place: str, tokenizer: Any, bos: Bos, key: str) -> TextSet:
        place_key = f"{key}.texts.{name}"
        corpus = corpus_at(place, place_key)
        if corpus.builtin:
            documents = documents_of(corpus, "evaluation", tokenizer, place_key)
        else:
            documents = [Document.of_text(text) for text in corpus.documents]
        joined = "\n\n".join(document.text or "" for document in documents)
        ids = torch.tensor(
            tokenizer(joined, add_special_tokens=bos == "as_tokenised")["input_ids"], dtype=torch.long
        )
        content = self.length - 1 if bos == "each_window" else self.length
        there = len(ids) // content
        count = there if self.num_windows is None else self.num_windows
        if there < max(1, count):
            raise ConfigError(
                place_key,
                f"{max(1, count)} windows of {content} tokens are asked for, this text has {there}",
                value=f"{place}: {len(documents)} documents, {len(ids):,} tokens",
                hint=f"set {key}.num_windows to at most {there}, or null for all"
                if there
                else f"lower {key}.length",
            )
        rows = ids[: count * content].reshape(count, content)
        if bos == "each_window":
            rows = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), rows], dim=1)
        # Documents behind the last window are not used, but which ones those are is the tokenizer's business.
        used = tuple(document.id for document in documents)
        return TextSet(name, "evaluation", rows, used, {"text": corpus.sha256, "bos": bos}, bos)

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """See Evaluator."""
        return {"evaluator": "perplexity", "texts": {name: text.key for name, text in texts.items()}}

    @torch.no_grad()
    def evaluate(self, task: Task) -> Outcome:
        """See Evaluator; RunError when the model's likelihoods are not finite."""
        model, texts = task.model, task.texts
        total = sum(len(text.tokens_NT) for text in texts.values())
        done = 0
        metrics: dict[str, float] = {}
        notes: list[str] = []
        with model.plan.holding(model.model):
            for name, text in texts.items():
                count, length = text.tokens_NT.shape
                summed, size = 0.0, rows_a_pass(model, length)
                for where, losses in in_batches(
                    text.tokens_NT, size, partial(token_losses, model), notes, f"perplexity on '{name}'"
                ):
                    summed += float(losses.double().sum())
                    task.on_progress(done + where.stop, total)
                done += count
                mean = summed / (count * (length - 1))
                if not math.isfinite(mean) or mean > MAX_MEAN_LOSS:
                    raise RunError(f"perplexity on '{name}' is not finite: the model's mean loss is {mean}")
                metrics[f"perplexity/{name}"] = math.exp(mean)
        return Outcome(metrics, notes=notes)
