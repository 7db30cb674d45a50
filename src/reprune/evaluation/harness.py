"""The evaluation harness (lm-eval): running one of its tasks on a loaded model, nothing left changed."""

from __future__ import annotations

import copy
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval
import lm_eval.evaluator
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from reprune.evaluation.harness_catalogue import FILE_FORMATS, Catalogue
from reprune.model.loading import LoadedModel
from reprune.model.trimming import require_kept

SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
"""Those of the harness's command line."""

VERSION = str(lm_eval.__version__)


@dataclass(frozen=True)
class Measured:
    """What the harness made of one entry: its numbers by task or group, its examples and its objects by task."""

    results: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    tasks: Mapping[str, Any]


@contextmanager
def undisturbed() -> Iterator[None]:
    """No bars, logs or warnings of the harness, and every random stream as it was afterwards.

    Our own lines go to standard output, which stays as it is.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    streams = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(redirect_stderr(StringIO()))
        # Two seconds of asking for versions a task, which a run has in its environment.json.
        stack.enter_context(patch.object(lm_eval.evaluator, "add_env_info"))
        # It asks git of the folder it is started in, which answers on the terminal where that is no checkout.
        stack.enter_context(patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None))
        stack.enter_context(torch.random.fork_rng())
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            datasets.disable_progress_bars()
            # The harness forks to describe its environment, which tokenizers warn of.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            yield
        finally:
            random.setstate(streams[0])
            np.random.set_state(streams[1])
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if not bars:
                datasets.enable_progress_bars()
            if parallelism is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = parallelism


class _Counting(HFLM):  # type: ignore[misc]
    """The harness's model, which tells how many of its requests went through instead of drawing bars."""

    def __init__(self, model: LoadedModel, batch_size: int, on_share: Callable[[float], None]) -> None:
        # A copy: the harness gives a tokenizer padding.
        super().__init__(
            pretrained=model.model, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size
        )
        self._loaded, self._on_share = model, on_share
        self._seen, self._expected = 0, 1

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._seen, self._expected = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **keywords: Any) -> Any:
        # The last token of a continuation is scored and never read: no forward pass would miss it.
        for _, context, continuation in requests:
            require_kept(self._loaded, torch.tensor([*context, *continuation]))
        return super()._loglikelihood_tokens(requests, *args, **keywords)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._seen, self._expected = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        made = super()._model_call(inps, *args, **keywords)
        self._count(inps)
        return made

    def _model_generate(self, context: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        made = super()._model_generate(context, *args, **keywords)
        self._count(context)
        return made

    def _count(self, rows: torch.Tensor) -> None:
        # One row may answer several requests: those that differ in their last token alone.
        self._seen += len(rows)
        self._on_share(min(1.0, self._seen / self._expected))


def measure(
    model: LoadedModel,
    catalogue: Catalogue,
    name: str,
    *,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    on_share: Callable[[float], None],
) -> Measured:
    """Run one task, group or tag as the harness's command line does; the caller holds the model on its device.

    Raises whatever the harness, its task and the dataset raise; torch.OutOfMemoryError where the batch does not fit.
    """
    with undisturbed():
        found = lm_eval.simple_evaluate(
            model=_Counting(model, batch_size, on_share),
            tasks=[name],
            task_manager=catalogue,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=True,
            **SEEDS,
        )
    assert found is not None
    return Measured(found["results"], found["samples"], catalogue.loaded["tasks"])


def task_config(task: Any) -> dict[str, Any]:
    """A task's config as the harness dumps it, without what says where it lies on this machine."""
    config: dict[str, Any] = copy.deepcopy(dict(task.dump_config()))
    config.pop("metadata", None)
    if config.get("dataset_path") in FILE_FORMATS:
        given = dict(config.get("dataset_kwargs") or {})
        config["dataset_kwargs"] = {
            name: value for name, value in given.items() if name not in ("data_files", "data_dir")
        }
    return dict(_plain(config))


def _plain(value: Any) -> Any:
    """As JSON; a callable without source is told by its name, never by its address in memory."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if value is None or isinstance(value, bool | int | float | str):
        return re.sub(r" at 0x[0-9a-f]+", "", value) if isinstance(value, str) else value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
