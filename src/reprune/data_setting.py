"""The texts of a config and what they overlap with, built without the rest of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from reprune.build import build
from reprune.calibration.corpora import CorpusSource
from reprune.calibration.gather import Request, cut_all, requests_of
from reprune.calibration.overlap import run_length
from reprune.calibration.roles import Texts, check_roles
from reprune.calibration.source import Document, TextContext, TextSource
from reprune.calibration.splits import common_runs
from reprune.calibration.windows import resolve_bos
from reprune.compose import Composed, compose_run
from reprune.errors import ConfigError
from reprune.files import sha256_of_json
from reprune.model.checkpoint import ModelSource
from reprune.model.description import load_config, load_tokenizer
from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel, load_model
from reprune.tracking.progress import LOG, ProgressView

Models = dict[str, LoadedModel]


@dataclass(frozen=True)
class Setting:
    """What of a config the text needs; `models` are those that are loaded already."""

    composed: Composed
    source: ModelSource
    tokenizer: Any
    requests: list[Request]
    models: Models

    @staticmethod
    def of(overrides: list[str], models: Models) -> Setting:
        """Build and check it; ConfigError for what is wrong."""
        composed = compose_run(overrides)
        config, where = composed.config, composed.where
        source: ModelSource = build(config["model"], "model", where)
        requests = requests_of(
            build(config["calibration"], "calibration", where),
            build(config["reconstruction_data"], "reconstruction_data", where),
            built(config, "validation", where),
            built(config, "probes", where),
        )
        tokenizer = load_tokenizer(source)
        longest = getattr(load_config(source).get_text_config(), "max_position_embeddings", None)
        for request in requests:
            request.source.check(request.key)
            resolve_bos(request.source.bos, tokenizer, request.key)
            if longest is not None and (request.source.length or 0) > longest:
                raise ConfigError(f"{request.key}.length", "longer than the model's context", value=request.source.length, accepted=f"at most {longest}")  # fmt: skip
        return Setting(composed, source, tokenizer, requests, models)

    def model(self) -> LoadedModel:
        """The dense model; the last one is kept, for the settings that share it."""
        config = self.composed.config
        key = sha256_of_json([config[name] for name in ("model", "device", "dtype", "threads")])
        if key not in self.models:
            self.models.clear()
            said = getattr(load_config(self.source), "dtype", None)
            stored = said if isinstance(said, torch.dtype) else getattr(torch, str(said), None)
            plan = plan_device(config["device"], config["dtype"], stored, config["threads"])
            plan.settle()
            self.models[key] = load_model(self.source, self.tokenizer, plan)
        return self.models[key]

    def texts(self, uses: Iterable[str], perplexity: bool) -> tuple[Texts, LoadedModel | None]:
        """The texts of these uses, and the model where they or their perplexity need it."""
        wanted = [request for request in self.requests if request.use in uses]
        needed = perplexity or any(request.source.needs_model for request in wanted)
        model = self.model() if needed else None
        config = self.composed.config
        seed = config["seed"] if config["seed_data"] is None else config["seed_data"]
        with ProgressView() as view:
            watched = [_watched(request, view) for request in wanted]
            return cut_all(watched, self.tokenizer, model, seed)[0], model

    def overlap(self, texts: Texts) -> dict[str, float]:
        """For each held-out text the share of calibration windows that repeat it; see calibration.roles."""
        evaluators = built(self.composed.config, "evaluation", self.composed.where)
        evaluation = {
            f"{name}.{text}": windows
            for name, evaluator in evaluators.items()
            for text, windows in evaluator.cut(self.tokenizer, f"evaluation.{name}").items()
        }
        corpora = [
            request.source.corpus(request.key)
            for request in self.requests
            if isinstance(request.source, CorpusSource)
        ]
        common = common_runs(self.tokenizer, corpora)
        return check_roles(texts, evaluation, common, run_length(self.tokenizer), most=1.0)


def built(config: Mapping[str, Any], group: str, where: Mapping[str, str]) -> dict[str, Any]:
    """The options of a group of several, those that are null left out."""
    nodes = config[group] or {}
    return {name: build(node, f"{group}.{name}", where) for name, node in nodes.items() if node is not None}


class _Watched:
    """A source that tells how many tokens it has written."""

    def __init__(self, source: Any, tell: Callable[[int], None]) -> None:
        self._source, self._tell = source, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def documents(self, context: TextContext) -> Iterator[Document]:
        """The source's own."""
        written = 0
        for document in self._source.documents(context):
            written += 0 if document.tokens is None else len(document.tokens)
            self._tell(written)
            yield document


def _watched(request: Request, view: ProgressView) -> Request:
    """The request itself, or with a bar, and a line for every quarter, where the model writes the text."""
    source = request.source
    windows = source.num_sequences if source.pool is None else source.pool
    if not (source.needs_model and source.endless and windows and source.length):
        return request
    total = windows * source.length
    update = view.evaluation(request.name)
    told = [0]

    def tell(written: int) -> None:
        update(min(written, total), total)
        quarter = min(4, 4 * written // total)
        if quarter > told[0]:
            told[0] = quarter
            LOG.info("%s: %s of %s tokens", request.key, f"{min(written, total):,}", f"{total:,}")

    return replace(request, source=cast(TextSource, _Watched(source, tell)))
