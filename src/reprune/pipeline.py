"""A run, from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from reprune.arithmetic import guessed_seconds
from reprune.calibration.describe import describe_run
from reprune.calibration.roles import Texts
from reprune.engine.activations import Stores
from reprune.engine.loop import BlockLoop
from reprune.engine.spread import SpreadLoop, spreads
from reprune.engine.state import RunState
from reprune.errors import ConfigError, RunError
from reprune.evaluation.suite import dense_result, dense_scratch, evaluate_pruned, finished
from reprune.export import export, exported
from reprune.files import read_json, write_json
from reprune.kept_texts import check_alike, keep_texts
from reprune.measured_plan import check_coupled, check_last_layers, pruning_plan
from reprune.model.loading import LoadedModel, load_model
from reprune.profile import TRACE, show, told_time, traced
from reprune.ranks import ALONE
from reprune.records import block_metrics
from reprune.resources import StageMeter
from reprune.result import result_of, summary_of
from reprune.run_folder import RunFolder, environment_of
from reprune.run_plan import RunPlan
from reprune.tracking.contract import RunInfo, Tracker
from reprune.tracking.progress import ProgressView
from reprune.transform.contract import Surroundings, Untransformed

LOG = logging.getLogger("reprune")
OnCommit = Callable[[int], None]
Committed = Callable[[int, list[dict[str, Any]], list[dict[str, Any]]], None]


def run(plan: RunPlan, after_commit: OnCommit = lambda windows: None) -> dict[str, Any]:
    """Prune, reconstruct, evaluate, record; returns the result. A finished run is not done again.

    Raises RunError when the run cannot go on; what was recorded stays, and the folder says why.
    """
    folder = plan.folder
    plan.device.settle()
    with folder.locked():
        plan = led(plan)
        if complete(plan):
            LOG.info("%s is finished: nothing to do", folder.path)
            result: dict[str, Any] = read_json(folder.path / "result.json")
            return result
        for left in folder.path.rglob(".*.part"):
            # What a killed writer left of one file.
            if left.is_file():
                left.unlink()
        try:
            if folder.finished and not RunState(folder.state).windows_done():
                raise RunError(
                    f"{folder.path} is finished and its state/ was freed, so nothing is left to evaluate or export by this "
                    "command; use reprune-eval on the run if it exported its model, or remove the folder to prune anew"
                )
            # What a finished run was made with and how it ended stay as they were when it is evaluated anew.
            if not folder.finished:
                first = len(folder.blocks())
                folder.mark(
                    "running",
                    block=first,
                    windows_done=RunState(folder.state).windows_done(),
                    begun_s=time.time(),
                    num_blocks=plan.shapes.num_blocks,
                    first_block=first,
                    blocks_begun_s=None,
                )
                environment = {**environment_of(plan.device), "overrides": list(plan.composed.overrides)}
                folder.write_setup(yaml.safe_dump(plan.config, sort_keys=False), environment)
            return _run(plan, after_commit)
        except KeyboardInterrupt:
            _mark_end(folder, "interrupted")
            raise
        except (RunError, ConfigError) as error:
            _mark_end(folder, "failed", error=str(error))
            raise
        except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
            told = explained(error, plan)
            _mark_end(folder, "failed", error=str(told))
            raise told from error
        except Exception as error:
            _mark_end(folder, "failed", error=f"{type(error).__name__}: {error}")
            raise


def _mark_end(folder: RunFolder, state: str, **facts: Any) -> None:
    """Write how a run ended; on a full disk what it failed of is told all the same, and the folder reads as killed.

    It is written once more where that itself is interrupted: when a process of a run dies the others are told to end,
    often in the moment in which they note that they failed of it.
    """
    try:
        try:
            _mark(folder, state, **facts)
        except KeyboardInterrupt:
            _mark(folder, state, **facts)
            LOG.error("%s", facts.get("error", state))
            raise
    except OSError as error:
        LOG.warning("%s cannot be marked as %s: %s", folder.path, state, error)


def _mark(folder: RunFolder, state: str, **facts: Any) -> None:
    if not folder.finished:
        folder.mark(state, block=len(folder.blocks()), **facts)


def _run(plan: RunPlan, after_commit: OnCommit) -> dict[str, Any]:
    """The method section: load, text, dense evaluation, prune and reconstruct, pruned evaluation, record."""
    folder, meter = plan.folder, StageMeter(plan.device)
    guessed = guessed_seconds(plan)
    with ExitStack() as stack:
        view = stack.enter_context(ProgressView())
        tracker = stack.enter_context(plan.tracking.start(_info(plan)))
        with meter.stage("loading"):
            model = load_model(
                plan.source, plan.tokenizer, plan.device, on_disk=plan.memory.weights == "disk"
            )
            if not plan.transform.renumbers:
                check_coupled(plan, model)
            if isinstance(plan.transform, Untransformed):
                check_last_layers(plan, model)
        with meter.stage("text"):
            texts = plan.texts(model)
            plan.device.ranks.wait()
            check_alike(texts, plan.device.ranks)
            overlap = plan.check_texts(texts)
            going_on = RunState(folder.state).windows_done() > 0
            keep_texts(folder.path / "calibration.safetensors", texts, going_on)
        described = folder.path / "calibration.json"
        if not (going_on and described.is_file()):
            with meter.stage("describing"):
                write_json(described, describe_run(texts, plan.tokenizer, model, overlap))
        with meter.stage("dense evaluation"):
            dense = {
                entry.name: dense_result(model, entry, dense_scratch(folder.path, entry), view.evaluation)
                for entry in plan.suite
            }
        stores = stores_of(plan)
        model = transformed(plan, model, texts, stores, meter)
        if not folder.finished:
            windows = RunState(folder.state).windows_done()
            folder.mark(
                "running", block=len(folder.blocks()), windows_done=windows, blocks_begun_s=time.time()
            )
        loop = block_loop(plan, model, texts, stores, meter, view, _committing(folder, tracker, after_commit))
        rows, masks = loop.run()
        plan.device.ranks.part()
        if loop.pruning.gradients is not None:
            loop.pruning.gradients.forget()
        folder.write_blocks(rows)
        view.clear()
        model = plan.transform.made_for("evaluation", model, folder.path)
        with meter.stage("evaluation"):
            for entry in plan.suite:
                if not finished(folder.path, entry):
                    evaluate_pruned(model, entry, folder.path, dense[entry.name], view.evaluation)
        with meter.stage("export"):
            exports = export(plan, plan.transform.made_for("export", model, folder.path), texts, masks)
        again = folder.finished
        result = result_of(plan, rows, meter, guessed, overlap, exports)
        tracker.finish(summary_of(result), [{"block": row["block"], **block_metrics(row)} for row in rows])
        if not folder.finished:
            folder.mark("finished")
        # Before a mirror is closed, which may wait for a network.
        write_json(folder.path / "result.json", result)
    if plan.config["profile"]:
        show(meter, folder.path / TRACE)
    if not again:
        LOG.info(told_time(sum(meter.seconds.values()), guessed))
    return result


def led(plan: RunPlan) -> RunPlan:
    """Tell the other processes whether there are blocks to prune; the plan, and that of this process alone where not."""
    windows = RunState(plan.folder.state).windows_done()
    if plan.device.ranks.tell(not plan.folder.finished and windows < plan.num_windows):
        return plan
    plan.device.ranks.part()
    return replace(plan, device=replace(plan.device, ranks=ALONE))


def stores_of(plan: RunPlan) -> Stores:
    """Where the run's activations rest."""
    return Stores(
        plan.device.dtype,
        plan.shapes.hidden_size,
        plan.folder.path / "activations",
        plan.memory.activations == "disk",
        plan.device.ranks,
    )


def transformed(
    plan: RunPlan, model: LoadedModel, texts: Texts, stores: Stores, meter: StageMeter
) -> LoadedModel:
    """What is dense from here on; the one that is given is used up."""
    if isinstance(plan.transform, Untransformed):
        return model
    evaluated = [text for entry in plan.suite for text in entry.texts.values()]
    with meter.stage("transform"):
        around = Surroundings(plan.source, texts, evaluated, stores, plan.folder.path)
        model = plan.transform.apply(model, around)
    if plan.transform.renumbers:
        check_coupled(plan, model)
    check_last_layers(plan, model)
    return model


def _committing(folder: RunFolder, tracker: Tracker, after_commit: OnCommit) -> Committed:
    """What is written and told when a window is finished."""

    def committed(windows: int, rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        folder.write_blocks(rows)
        folder.mark("running", block=len(rows), windows_done=windows)
        for row in new:
            tracker.log(block_metrics(row), step={"block/index": row["block"]})
        after_commit(windows)

    return committed


def block_loop(
    plan: RunPlan,
    model: LoadedModel,
    texts: Texts,
    stores: Stores,
    meter: StageMeter,
    view: ProgressView,
    committed: Committed,
) -> BlockLoop:
    """The loop over the model's blocks, which is `committed` window by window."""
    folder = plan.folder
    state = RunState(folder.state)
    if state.windows_done() and not folder.finished:
        LOG.info("going on after %d finished windows in %s", state.windows_done(), folder.path)
    traces = plan.config["profile"] and plan.device.ranks.first
    pruning = pruning_plan(plan, model, texts, stores, meter)
    spread = spreads(plan.technique, len(pruning.rounds), plan.shapes.tied, plan.device.ranks)
    return (SpreadLoop if spread else BlockLoop)(
        model=model,
        texts=texts,
        pruning=pruning,
        technique=plan.technique,
        stores=stores,
        state=state,
        meter=meter,
        listener=view,
        seed_training=plan.seed_training,
        after_commit=committed,
        tracing=partial(traced, folder.path / TRACE) if traces else nullcontext,
    )


def complete(plan: RunPlan) -> bool:
    """Whether nothing is left to do and the record shows it: it shows the suite that was asked for last."""
    if not nothing_left(plan):
        return False
    shown: list[str] = read_json(plan.folder.path / "result.json")["suite"]
    return shown == [entry.hash for entry in plan.suite]


def nothing_left(plan: RunPlan) -> bool:
    """Whether all that was asked for is there: the record, its evaluations, its exports."""
    if not plan.folder.finished or not all(finished(plan.folder.path, entry) for entry in plan.suite):
        return False
    return exported(plan)


def _info(plan: RunPlan) -> RunInfo:
    config = {"choices": plan.composed.choices, **plan.config}
    return RunInfo(plan.folder.id, plan.folder.path, plan.config["experiment"], config)


def explained(error: Exception, plan: RunPlan) -> RunError:
    """What a person reads of a full disk, of a full device, of what cannot be read or written."""
    if isinstance(error, torch.OutOfMemoryError):
        place = f"block {len(plan.folder.blocks())}"
        return RunError(
            f"{place}: the device is out of memory; lower reconstruction.batch_size "
            f"(now {plan.technique.batch_size}) or calibration.length, or use dtype=bfloat16"
        )
    if isinstance(error, OSError):
        return RunError(
            f"{error.strerror or error}: {error.filename or plan.folder.path}; "
            "the same command goes on from the last finished window"
        )
    # safetensors has its own exception for a disk that is full.
    return RunError(
        f"{plan.folder.path} cannot be written: {error}; free disk space and run the same command again"
    )
