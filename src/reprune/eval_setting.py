"""What `reprune-eval` was asked for: a finished run or a saved model, and a suite, all checked before weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from reprune import pipeline
from reprune.calibration.gather import cut_all
from reprune.check import check
from reprune.compose import Composed, compose_run
from reprune.engine.state import RunState
from reprune.engine.windows import windows_over
from reprune.errors import ConfigError, did_you_mean
from reprune.eval_model import dense_results
from reprune.evaluation.suite import evaluate_pruned, evaluation_file, finished
from reprune.files import read_json, write_json
from reprune.model.loading import load_model
from reprune.model.sources import LocalModel
from reprune.resources import StageMeter
from reprune.result import result_of
from reprune.run_folder import RunFolder
from reprune.run_plan import RunPlan
from reprune.schema import ExportConfig, RunConfig
from reprune.tracking.progress import LOG, ProgressView

OF_A_RUN = ("evaluation", "threads")


@dataclass(frozen=True)
class Found:
    """What an evaluator found: metrics of the model and of the dense one, what failed by part, remarks, where it lies."""

    name: str
    metrics: Mapping[str, float]
    dense: Mapping[str, float]
    failed: Mapping[str, str]
    notes: Sequence[str]
    file: Path


class Evaluation(Protocol):
    """A checked evaluation: of a run, or of a model."""

    @property
    def title(self) -> str:
        """What the model is called beside the dense one."""
        ...

    @property
    def there(self) -> bool:
        """Whether every result is there already."""
        ...

    def evaluate(self) -> None:
        """Load what is needed and write the results; RunError where it cannot go on."""
        ...

    def results(self) -> list[Found]:
        """What is on disk, an entry an evaluator of the suite."""
        ...


def check_overrides(overrides: Sequence[str], accepted: Sequence[str], why: str) -> None:
    """ConfigError for an override of anything but `accepted`, and where no evaluation is chosen."""
    heads = []
    for item in overrides:
        key = item.lstrip("+~").partition("=")[0]
        head = key.split(".")[0].split("@")[0].split("/")[0]
        heads.append(head)
        if "=" not in item and not item.startswith("~"):
            raise ConfigError(item, "this is no override", accepted="KEY=VALUE", hint="evaluation=quick")
        if head not in accepted:
            known = head in RunConfig.__dataclass_fields__
            raise ConfigError(
                key,
                why if known else "nothing that can be set here",
                value=item,
                accepted=accepted,
                hint=None if known else did_you_mean(head, accepted),
            )
    if "evaluation" not in heads:
        raise ConfigError("evaluation", "nothing is chosen to evaluate", hint="e.g. evaluation=perplexity")


def check_chosen(composed: Composed) -> None:
    """ConfigError for a suite without evaluators."""
    if not any(node is not None for node in (composed.config["evaluation"] or {}).values()):
        raise ConfigError("evaluation", "this suite holds no evaluator", hint="e.g. evaluation=perplexity")


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run, with the suite to evaluate it by in place of its own."""

    plan: RunPlan

    title = "pruned"

    @staticmethod
    def of(place: Path, overrides: Sequence[str]) -> EvaluatedRun:
        """Read the run's config, put the suite in, check. ConfigError unless it is this very run, finished, with its weights."""
        folder = RunFolder(place.resolve())
        if not folder.finished:
            raise ConfigError(
                "RUN", f"this run is not finished: {folder.status().words}", value=place,
                hint="run its own command again: it goes on from the last finished window",
            )  # fmt: skip
        check_overrides(
            overrides, OF_A_RUN, "this belongs to the run, of which only the evaluation can be chosen anew"
        )
        asked = compose_run(overrides)
        check_chosen(asked)
        try:
            result = read_json(folder.path / "result.json")
        except ValueError as error:
            raise ConfigError("RUN", f"its result.json cannot be read: {error}", value=place) from error
        if not folder.id.endswith(f"-{result['config_hash']}"):
            raise ConfigError(
                "RUN", "the folder of a run ends in its hash, this one was renamed", value=place,
                accepted=f"*-{result['config_hash']}", hint=f"rename it to {result['id']}",
            )  # fmt: skip
        config = {**asked.config, **yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))}
        # What was exported and deleted again is not asked for anew.
        config |= {"evaluation": asked.config["evaluation"], "output_dir": str(folder.path.parent)}
        config["memory"] = asked.config["memory"]
        config |= {"dry_run": False, "profile": False, "export": asdict(ExportConfig())}
        # Its tracker has ended with it: what is found later stands in the folder.
        config |= {"tracking": {"_target_": "reprune.tracking.jsonl.JsonlTracking"}}
        if any(item.lstrip("+").startswith("threads=") for item in overrides):
            config["threads"] = asked.config["threads"]
        choices = {**result["choices"], "evaluation": asked.choices.get("evaluation", "")}
        plan = check(Composed(config, choices, tuple(overrides), {}))
        _check_same(result["identity"], plan.identity, folder)
        found = EvaluatedRun(replace(plan, folder=folder))
        if not (found._all_finished or found._whole or found._exported):
            raise ConfigError(
                "RUN", "its weights are gone: neither state/ nor model/ is there whole", value=place,
                hint="prune it again, into another output_dir, with export.model=true and this evaluation",
            )  # fmt: skip
        return found

    @property
    def _all_finished(self) -> bool:
        return all(finished(self.plan.folder.path, entry) for entry in self.plan.suite)

    @property
    def _whole(self) -> bool:
        """Whether `state/` holds every block: restoring passes over files that are not there."""
        technique, state = self.plan.technique, RunState(self.plan.folder.state)
        windows = windows_over(self.plan.shapes.num_blocks, technique.window, technique.stride)
        reached = [0, *(window.frozen for window in windows)]
        return state.windows_done() == len(windows) and all(
            (state.folder / f"frozen_{number:04d}.safetensors").is_file()
            for number in range(1, len(windows) + 1)
            if reached[number] > reached[number - 1]
        )

    @property
    def _exported(self) -> bool:
        return (self.plan.folder.path / "model" / "config.json").is_file()

    @property
    def there(self) -> bool:
        """See Evaluation; also whether the record shows this suite."""
        shown = read_json(self.plan.folder.path / "result.json")["suite"]
        return self._all_finished and (
            shown == [entry.hash for entry in self.plan.suite] or not (self._whole or self._exported)
        )

    def evaluate(self) -> None:
        """See Evaluation: from the run's state as the run itself would, else from the model it exported."""
        if self._whole:
            pipeline.run(self.plan)
        else:
            self._evaluate_exported()

    def _evaluate_exported(self) -> None:
        plan, folder = self.plan, self.plan.folder
        LOG.info("state/ is not there whole: evaluating the exported model %s", folder.path / "model")
        plan.device.settle()
        with folder.locked(), ProgressView() as view:
            dense = dense_results(
                plan.source, plan.tokenizer, plan.device, plan.suite, folder.path, view.evaluation
            )
            source = LocalModel(
                path=str(folder.path / "model"),
                name=plan.source.name,
                blocks_path=plan.source.blocks_path,
                trust_remote_code=plan.source.trust_remote_code,
            )
            model = load_model(source, plan.tokenizer, plan.device)
            model = plan.transform.reopened(model, folder.path)
            for entry in plan.suite:
                if not finished(folder.path, entry):
                    evaluate_pruned(model, entry, folder.path, dense[entry.name], view.evaluation)
            # Texts that the model wrote were held against the run's own evaluation when it was done.
            texts, _ = cut_all(plan.requests, plan.tokenizer, None, plan.seed_data)
            overlap = {**read_json(folder.path / "result.json")["overlap"], **plan.check_texts(texts)}
            meter = StageMeter(plan.device)
            result = result_of(plan, folder.blocks(), meter, None, overlap, {})
            write_json(folder.path / "result.json", result)

    def results(self) -> list[Found]:
        """See Evaluation."""
        folder = self.plan.folder.path
        return [found_in(entry.name, evaluation_file(folder, entry)) for entry in self.plan.suite]


def found_in(name: str, file: Path) -> Found:
    """What a result file holds."""
    content = read_json(file)
    beside = content.get("dense", {"metrics": {}, "failed": {}, "notes": []})
    failed = content["failed"] | {f"dense {part}": why for part, why in beside["failed"].items()}
    return Found(name, content["metrics"], beside["metrics"], failed, content["notes"], file)


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """ConfigError, saying what differs, where what is described now is not what the run was."""
    now = json.loads(json.dumps(dict(now)))
    differ = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if not differ:
        return
    key = differ[0]
    exported = folder.path / "model"
    raise ConfigError(
        "RUN",
        f"its config stands for another run today: {', '.join(differ)} differ",
        value=f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}",
        hint=f"evaluate its exported model: reprune-eval {exported} --dense MODEL"
        if exported.is_dir()
        else "use the version, the files and the device that it was made with, or prune again",
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
