"""One job inside Hydra, in this process or in a launcher's: check, run, and in a sweep leave a note of what failed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from reprune import dry_run
from reprune.compose import Composed, plain
from reprune.errors import ConfigError, HeldError, RunError
from reprune.files import read_json, sha256_of_json, write_json
from reprune.rules import left_out
from reprune.tracking.progress import LOG, configure_logging, quiet_libraries

if TYPE_CHECKING:
    from reprune.check import RunPlan

CHECKED: dict[str, RunPlan] = {}
"""Plans that were made in this process before Hydra began: a job that runs here need not be checked again."""


def key_of(composed: Composed) -> str:
    """A point's name, the same in every process: hash of its config and its choices."""
    return sha256_of_json([composed.config, composed.choices])


def job(config: DictConfig) -> dict[str, Any] | None:
    """Do one run, and return its result.

    In a sweep a failure is logged and noted, and the job returns None: what Hydra is not told of does not stop
    the other jobs, whatever the launcher. Alone it raises.
    """
    configure_logging()
    quiet_libraries()
    settings = HydraConfig.get()
    composed = Composed.of(plain(config), settings.runtime.choices, settings.overrides.task, {})
    if settings.mode is not RunMode.MULTIRUN:
        return _run(composed)
    if left_out(composed):
        return None
    note = note_of(composed)
    if note.is_file():
        # The same point twice in a grid: one attempt a sweep.
        return None
    try:
        return _run(composed)
    except HeldError:
        # A twin in this grid or in another sweep does it; whether it was done is looked at in the end.
        return None
    except (RunError, ConfigError) as error:
        write_json(note, {"error": str(error)})
    except Exception as error:
        LOG.exception("a defect, not a choice that went wrong:")
        write_json(note, {"error": f"{type(error).__name__}: {error}"})
    return None


def note_of(composed: Composed) -> Path:
    """Where a job of a sweep says why it failed, whether or not it came as far as its run folder."""
    return Path(composed.config["output_dir"]) / ".multirun" / "failed" / f"{key_of(composed)}.json"


def noted(composed: Composed) -> str | None:
    """Why this point failed in the sweep that ran last; None where it did not."""
    note = note_of(composed)
    return str(read_json(note)["error"]) if note.is_file() else None


def _run(composed: Composed) -> dict[str, Any] | None:
    from reprune.check import check
    from reprune.pipeline import run

    plan = CHECKED.pop(key_of(composed), None) or check(composed)
    if plan.config["dry_run"]:
        dry_run.show(plan)
        return None
    LOG.info("run     %s", plan.folder.path)
    try:
        result = run(plan)
    except (RunError, ConfigError) as error:
        LOG.error("failed  %s: %s", plan.folder.path, error)
        raise
    LOG.info("done    %s", plan.folder.path / "result.json")
    return result
