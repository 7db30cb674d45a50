"""The entry point: compose, check, run, exit code.

0 done; 1 a run failed; 2 bad input, found before any weight is loaded; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from reprune import dry_run, help
from reprune.compose import Composed, compose_run, jobs_of, plain, prepare
from reprune.errors import ConfigError, RunError
from reprune.exit_codes import exit_codes
from reprune.files import sha256_of_json
from reprune.tracking.progress import LOG, configure_logging, quiet_libraries

if TYPE_CHECKING:
    from reprune.check import RunPlan

HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--shell-completion", "-sc")


def main() -> None:
    """Compose and check every job of the command line first; only then enter Hydra, whose jobs raise."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        help.show()
        return
    config_folder = prepare()
    with exit_codes():
        if not any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments):
            check_all(arguments)
        else:
            compose_run(
                [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
            )
    # Otherwise Hydra prints its own trace and exits before main can say what happened.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with exit_codes(working=True, interrupted="the same command goes on from the last finished window"):
        hydra.main(config_path=str(config_folder), config_name="config", version_base="1.3")(job)()


def check_all(arguments: list[str]) -> None:
    """Compose and check every job that the arguments stand for; raises the first ConfigError."""
    composed = [compose_run(overrides) for overrides in jobs_of(arguments)]
    # Composing is cheap and catches most slips; what follows imports torch and reads text.
    from reprune.check import check

    quiet_libraries()
    for one in composed:
        _CHECKED[_key(one)] = check(one)


_CHECKED: dict[str, RunPlan] = {}
"""Plans that `check_all` made in this process: a job that runs here need not be checked again."""


def _key(composed: Composed) -> str:
    choices = {group: option for group, option in composed.choices.items() if not group.startswith("hydra/")}
    return sha256_of_json([composed.config, choices])


def job(config: DictConfig) -> dict[str, Any] | None:
    """One run inside Hydra, in this process or in a launcher's."""
    from reprune.check import check
    from reprune.pipeline import run

    configure_logging()
    quiet_libraries()
    settings = HydraConfig.get()
    choices = {str(key): str(value or "") for key, value in settings.runtime.choices.items()}
    composed = Composed(plain(config), choices, tuple(settings.overrides.task), {})
    plan = _CHECKED.pop(_key(composed), None) or check(composed)
    if plan.config["dry_run"]:
        dry_run.show(plan)
        return None
    LOG.info("run     %s", plan.folder.path)
    try:
        result = run(plan)
    except (RunError, ConfigError) as error:
        # In a sweep only the first failure is raised at its end: each is told when it happens.
        LOG.error("failed  %s: %s", plan.folder.path, error)
        raise
    LOG.info("done    %s", plan.folder.path / "result.json")
    return result


if __name__ == "__main__":
    main()
