"""What a run comes to: `result.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprune.evaluation.suite import metrics_of
from reprune.files import read_json
from reprune.records import measured_sparsity, reconstruction_metrics
from reprune.resources import StageMeter
from reprune.run_plan import RunPlan
from reprune.transform.contract import RECORD, Untransformed


def result_of(
    plan: RunPlan,
    rows: list[dict[str, Any]],
    meter: StageMeter,
    guessed: float | None,
    overlap: Mapping[str, float],
    exports: Mapping[str, Any],
) -> dict[str, Any]:
    """What `result.json` holds: identity, measured sparsity, time, memory and every metric; `rows` are the blocks'.

    `guessed` are the seconds that were guessed before it began, None where it is finished already; `exports` is what is
    said of the files written on request; what was said earlier stays.
    """
    evaluated, failed = metrics_of(plan.folder.path, plan.suite)
    earlier = read_json(plan.folder.path / "result.json") if plan.folder.finished else {}
    result: dict[str, Any] = {
        "id": plan.folder.id,
        "status": "finished",
        "config_hash": plan.folder.id.rsplit("-", 1)[1],
        "identity": plan.identity,
        "choices": plan.composed.choices,
        "experiment": plan.config["experiment"],
        "sparsity": measured_sparsity(rows, plan.shapes.num_prunable),
        "seconds": {name: round(seconds, 3) for name, seconds in meter.seconds.items()},
        "peak_memory_bytes": meter.peak_bytes,
        "overlap": dict(overlap),
        "suite": [entry.hash for entry in plan.suite],
        "metrics": {**evaluated, **reconstruction_metrics(rows)},
    }
    if earlier:
        # Time, memory and what a run was asked as are those of its pruning, not of an evaluation added later.
        result |= {name: earlier[name] for name in ("seconds", "peak_memory_bytes", "experiment")}
        asked = {"evaluation": result["choices"].get("evaluation", "")}
        result["choices"] = {**earlier["choices"], **asked}
    elif guessed is not None:
        result["guessed_seconds"] = round(guessed, 3)
    result |= {name: earlier[name] for name in ("compact", "guessed_seconds") if name in earlier}
    result |= exports
    if not isinstance(plan.transform, Untransformed):
        kind = {"class": type(plan.transform).__name__}
        result["transform"] = {**kind, **read_json(plan.folder.path / RECORD)}
    if meter.device_peak_bytes:
        result["peak_device_memory_bytes"] = meter.device_peak_bytes
    if failed:
        result["failed_evaluations"] = failed
    return result


def summary_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a result, with sparsity, time and memory, as a tracker shows them for the whole run."""
    seconds = {f"seconds/{stage}": value for stage, value in result["seconds"].items()}
    memory = {f"peak_memory_bytes/{stage}": value for stage, value in result["peak_memory_bytes"].items()}
    return {**result["metrics"], "sparsity/total": result["sparsity"]["total"], **seconds, **memory}
