"""Perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from reprune.calibration.source import TextSet
from reprune.errors import RunError
from reprune.evaluation.batches import in_batches
from reprune.evaluation.bootstrap import LEVEL, RESAMPLES, noise_of_ratio
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.texts import OnTexts, origins_of, scored_of, units_of
from reprune.files import write_atomically
from reprune.model.likelihood import rows_a_pass, token_losses

MAX_MEAN_LOSS = 700


@dataclass(kw_only=True)
class Perplexity(OnTexts):
    """exp of the mean negative log-likelihood per scored token, over all windows of each text together.

    The windows are OnTexts'. `perplexity_evaluation_noise/TEXT/{low,high,standard_error}` are of a bootstrap over the
    windows (by document: over the documents). `windows_TEXT.parquet` keeps a row a window: `window`, `document` where
    it is one of a document, `tokens` (how many were scored), `nll` (their sum, in nats).
    """

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """See Evaluator."""
        return {
            "evaluator": "perplexity",
            "texts": {name: text.key for name, text in texts.items()},
            "bootstrap": [RESAMPLES, LEVEL],
        }

    def evaluate(self, task: Task) -> Outcome:
        """See Evaluator; a text on which the model's likelihoods are not finite has failed, RunError when all have."""
        total = sum(len(text.tokens_NT) for text in task.texts.values())
        outcome, done = Outcome({}, notes=origins_of(task.texts)), 0
        with task.model.holding(task.model.model):
            for name, text in task.texts.items():
                windows = window_losses(task, name, text, outcome.notes, done, total)
                done += len(windows)
                # pandas would sum over what is not a number.
                mean = windows["nll"].to_numpy().sum() / windows["tokens"].sum()
                if not math.isfinite(mean) or mean > MAX_MEAN_LOSS:
                    outcome.failed[f"perplexity/{name}"] = (
                        f"perplexity on '{name}' is not finite: the model's mean loss is {mean}"
                    )
                    continue
                write_frame(task.folder / f"windows_{name}.parquet", windows)
                outcome.metrics[f"perplexity/{name}"] = math.exp(mean)
                units = windows.groupby(units_of(text).numpy())[["nll", "tokens"]].sum()
                noise = noise_of_ratio(units["nll"].to_numpy(), units["tokens"].to_numpy(), np.exp)
                if noise is not None:
                    label = f"perplexity_evaluation_noise/{name}"
                    outcome.metrics[f"{label}/low"] = noise.low
                    outcome.metrics[f"{label}/high"] = noise.high
                    outcome.metrics[f"{label}/standard_error"] = noise.standard_error
        if not outcome.metrics:
            raise RunError("; ".join(outcome.failed.values()))
        return outcome


@torch.no_grad()
def window_losses(
    task: Task, name: str, text: TextSet, notes: list[str], done: int, total: int
) -> pd.DataFrame:
    """A row a window, in order: its number, its document where it has one, tokens scored, their summed loss in nats."""
    model, scored_NT = task.model, scored_of(text)
    size = rows_a_pass(model, text.tokens_NT.shape[1])
    sums = []
    for where, losses in in_batches(
        text.tokens_NT, size, partial(token_losses, model), notes, f"perplexity on '{name}'"
    ):
        sums.append(losses.double().where(scored_NT[where], 0).sum(dim=1))
        task.on_progress(done + where.stop, total)
    return window_frame(text, {"nll": torch.cat(sums).numpy()})


def window_frame(text: TextSet, columns: Mapping[str, Any]) -> pd.DataFrame:
    """A row a window: `window`, `document` where windows are of documents, `tokens` scored, and further columns."""
    units, count = units_of(text), len(text.tokens_NT)
    numbers = {"window": np.arange(count)}
    if not torch.equal(units, torch.arange(count)):
        numbers["document"] = units.numpy()
    return pd.DataFrame({**numbers, "tokens": scored_of(text).sum(dim=1).numpy(), **columns})


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a Parquet file atomically."""
    write_atomically(path, lambda temporary: frame.to_parquet(temporary, index=False))
