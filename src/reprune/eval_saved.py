"""A saved or named model to evaluate, alone or beside the dense one that it was made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reprune.build import build
from reprune.compose import Composed, compose_run
from reprune.config_files import config_root
from reprune.data_setting import built
from reprune.errors import ConfigError, did_you_mean
from reprune.eval_model import ModelEntry, evaluate_alone, evaluate_beside
from reprune.eval_setting import Found, check_chosen, check_overrides, found_in
from reprune.evaluation.suite import check_suite, described_tokenizer, evaluation_file, finished
from reprune.files import sha256_of_json
from reprune.model.checkpoint import ModelSource
from reprune.model.description import dtype_of, load_config, load_tokenizer, skeleton
from reprune.model.device import DevicePlan, plan_device
from reprune.run_folder import HASH_LENGTH, RunFolder
from reprune.tracking.progress import ProgressView

OF_A_MODEL = ("evaluation", "model", "device", "dtype", "threads")
OUT = Path("outputs") / "evaluations"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, the dense one or None, and the suite; results go to `base`/evaluations."""

    source: ModelSource
    dense: ModelSource | None
    tokenizer: Any
    device: DevicePlan
    suite: list[ModelEntry]
    base: Path

    title = "model"

    @staticmethod
    def of(what: str, overrides: Sequence[str], dense: str | None, out: Path | None) -> EvaluatedModel:
        """Build and check it: `what` and `dense` are folders or names of options in conf/model. ConfigError as usual."""
        check_overrides(overrides, OF_A_MODEL, "nothing is pruned here, so this would have no effect")
        chosen = [item for item in overrides if item.startswith("model=")]
        if chosen:
            raise ConfigError("model", "the model is named by the first argument", value=chosen[0])
        composed = _composed(what, overrides)
        check_chosen(composed)
        config = composed.config
        source: ModelSource = build(config["model"], "model", composed.where)
        dense_source = None if dense is None else _dense_source(dense)
        device = plan_device(config["device"], config["dtype"], dtype_of(source), config["threads"])
        tokenizer = load_tokenizer(source)
        skeleton(source)
        subject = {
            "model": source.identity(),
            "tokenizer": described_tokenizer(tokenizer),
            "dense": None if dense_source is None else dense_source.identity(),
            "dtype": str(device.dtype),
            "device": device.kind,
        }
        suite = []
        for name, evaluator in built(config, "evaluation", composed.where).items():
            key = f"evaluation.{name}"
            if dense_source is None and getattr(evaluator, "needs_dense", False):
                raise ConfigError(
                    key, "compares a model with the dense one, and none is named", hint="--dense MODEL"
                )
            texts = evaluator.cut(tokenizer, key)
            suite.append(ModelEntry(name, evaluator, texts, subject))
        longest = getattr(load_config(source).get_text_config(), "max_position_embeddings", None)
        check_suite(suite, longest)
        if dense_source is not None:
            _check_tokenizer(dense_source, tokenizer, str(dense))
        base = _base(what, source, out)
        return EvaluatedModel(source, dense_source, tokenizer, device, suite, base)

    @property
    def there(self) -> bool:
        """See Evaluation."""
        return all(finished(self.base, entry) for entry in self.suite)

    def evaluate(self) -> None:
        """See Evaluation."""
        self.device.settle()
        with RunFolder(self.base).locked(), ProgressView() as view:
            rest = (self.tokenizer, self.device, self.suite, self.base, view.evaluation)
            if self.dense is None:
                evaluate_alone(self.source, *rest)
            else:
                evaluate_beside((self.source, self.dense), *rest)

    def results(self) -> list[Found]:
        """See Evaluation."""
        return [found_in(entry.name, evaluation_file(self.base, entry)) for entry in self.suite]


def _composed(what: str, overrides: Sequence[str]) -> Composed:
    """The config with the folder or the named option as its model."""
    place = Path(what)
    if not place.is_dir():
        return compose_run([f"model={what}", *overrides])
    composed = compose_run(["model=local", *overrides])
    model = {**composed.config["model"], "path": what}
    if model["name"] == "local":
        model["name"] = place.resolve().name
    return replace(composed, config={**composed.config, "model": model})


def _dense_source(what: str) -> ModelSource:
    names = sorted(path.stem for path in (config_root() / "conf" / "model").glob("*.yaml"))
    if not Path(what).is_dir() and what not in names:
        raise ConfigError(
            "--dense", "no such folder, and no model has this name", value=what, accepted=names,
            hint=did_you_mean(what, names),
        )  # fmt: skip
    try:
        composed = _composed(what, [])
        source: ModelSource = build(composed.config["model"], "model", composed.where)
        skeleton(source)
    except ConfigError as error:
        raise error.under("--dense") from None
    return source


def _check_tokenizer(dense: ModelSource, tokenizer: Any, what: str) -> None:
    """ConfigError for a dense model with another tokenizer, to which the same text is other tokens."""
    if described_tokenizer(load_tokenizer(dense)) != described_tokenizer(tokenizer):
        raise ConfigError(
            "--dense", "its tokenizer makes other tokens of the text, so that nothing can be compared",
            value=what, accepted="the model that was pruned",
        )  # fmt: skip


def _base(what: str, source: ModelSource, out: Path | None) -> Path:
    """`out`; else the model's own folder where it can be written; else a folder named by the model's identity."""
    if out is not None:
        if out.exists() and not (out.is_dir() and os.access(out, os.W_OK | os.X_OK)):
            raise ConfigError("--out", "cannot be written", value=out, accepted="a writable folder")
        return out
    folder = Path(what)
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return folder
    return OUT / f"{source.name}-{sha256_of_json(source.identity())[:HASH_LENGTH]}"
