"""One job inside Hydra, in whatever process a launcher runs it: check, run, and in a sweep leave a note of what failed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from reprune import dry_run
from reprune.attempts import attempt
from reprune.compose import Composed, plain
from reprune.errors import ConfigError, HeldError, RunError
from reprune.files import read_json, write_json
from reprune.rules import left_out
from reprune.tracking.progress import LOG, configure_logging, quiet_libraries
from reprune.waiting import PLACES

if TYPE_CHECKING:
    from reprune.run_plan import RunPlan

HELD_PATIENCE_S, HELD_PAUSE_S = 60.0, 1.0
CHECKED: dict[str, RunPlan] = {}
"""Plans that were made in this process before Hydra began: a job that runs here need not be checked again."""


def job(config: DictConfig) -> dict[str, Any] | None:
    """Do one run; its result where it was no part of a sweep.

    In a sweep a failure is logged and noted, and nothing is raised: what Hydra is not told of does not stop the
    other jobs, whatever the launcher. Alone it raises.
    """
    configure_logging()
    settings = HydraConfig.get()
    composed = Composed.of(plain(config), settings.runtime.choices, settings.overrides.task, {})
    if settings.mode is not RunMode.MULTIRUN:
        quiet_libraries()
        plan = _checked(composed)
        if plan.config["dry_run"]:
            dry_run.show(plan)
            return None
        return do(plan)
    if Path(settings.runtime.cwd).is_dir():
        # A worker of a cluster was started elsewhere; relative paths are those of the command.
        os.chdir(settings.runtime.cwd)
    # The same point may stand twice in a grid: one attempt a sweep.
    if left_out(composed) or note_of(composed).is_file() or done_of(composed).is_file():
        return None
    if not composed.sweep["own_process"]:
        quiet_libraries()
        run_and_note(composed)
        return None
    try:
        why = attempt(composed)
    except Exception as error:
        # A queue that refuses to start the job again says so in the middle of the waiting.
        why = str(error)
    if why is not None and not note_of(composed).is_file():
        write_json(note_of(composed), {"error": why})
    return None


def run_and_note(composed: Composed) -> None:
    """Do one run of a sweep in this process. A failure is noted where the sweep looks for it, and not raised."""
    try:
        plan = _checked(composed)
        if plan.config["dry_run"]:
            dry_run.show(plan)
            return
        write_json(place_of(composed), {"run": plan.folder.id, "alike": plan.alike})
        do(plan, HELD_PATIENCE_S)
    except HeldError as error:
        # A twin does it; whether all was done that this point asks for is looked at in the end.
        LOG.info("left    %s", error)
    except (RunError, ConfigError) as error:
        write_json(note_of(composed), {"error": str(error)})
    except Exception as error:
        LOG.exception("a defect, not a choice that went wrong:")
        write_json(note_of(composed), {"error": f"{type(error).__name__}: {error}"})


def place_of(composed: Composed) -> Path:
    """Where a job says which run the point is: on another machine it may be another than where it was planned."""
    return composed.sweep_folder / PLACES / f"{composed.key}.json"


def note_of(composed: Composed) -> Path:
    """Where a job of a sweep says why it failed, whether or not it came as far as its run folder."""
    return composed.sweep_folder / "failed" / f"{composed.key}.json"


def done_of(composed: Composed) -> Path:
    """Where a sweep says of a point that it was finished before the sweep began: no process need start for it."""
    return composed.sweep_folder / "done" / f"{composed.key}.json"


def noted(composed: Composed) -> str | None:
    """Why this point failed in the sweep that ran last; None where it did not."""
    note = note_of(composed)
    return str(read_json(note)["error"]) if note.is_file() else None


def _checked(composed: Composed) -> RunPlan:
    from reprune.check import check

    return CHECKED.pop(composed.key, None) or check(composed)


def do(plan: RunPlan, patience_s: float = 0.0) -> dict[str, Any]:
    """Do a run; its result. Who holds the folder may be a process that is dying, or a point that only evaluates differently: wait a little."""
    from reprune.pipeline import run

    LOG.info("run     %s", plan.folder.path)
    until = time.monotonic() + patience_s
    while True:
        try:
            result = run(plan)
            break
        except HeldError:
            if time.monotonic() >= until:
                raise
            time.sleep(HELD_PAUSE_S)
        except (RunError, ConfigError) as error:
            LOG.error("failed  %s: %s", plan.folder.path, error)
            raise
    LOG.info("done    %s", plan.folder.path / "result.json")
    return result
