"""The entry point: compose, check, run, exit code.

0 done; 1 a run failed; 2 bad input, found before any weight is loaded; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import hydra

from reprune import dry_run, help, together
from reprune.compose import command_of, compose_run, prepare
from reprune.exit_codes import FAILED, exit_codes
from reprune.job import CHECKED, job
from reprune.queues import check_queue
from reprune.rules import check_rules, idle_rules, left_out
from reprune.tracking.progress import LOG, quiet_libraries

if TYPE_CHECKING:
    from reprune.sweep import Sweep

HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--shell-completion", "-sc")


def main() -> None:
    """Compose and check every job of the command line first; only then enter Hydra."""
    arguments = sys.argv[1:]
    if together.several():
        together.main(arguments)
        return
    if {"--help", "-h"} & set(arguments):
        help.show()
        return
    config_folder = prepare()
    sweep = None
    with exit_codes():
        if not any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments):
            sweep = check_all(arguments)
            if sweep is not None:
                sweep.announce()
        else:
            compose_run(
                [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
            )
    # Otherwise Hydra prints its own trace and exits before main can say what happened.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with exit_codes(working=True, interrupted="the same command goes on from the last finished window"):
        launch(config_folder, sweep)


def launch(config_folder: Path, sweep: Sweep | None) -> None:
    """Let Hydra run the job, or all jobs of a sweep; of those that are not finished at its end a table is printed.

    Raises what a single run raises, and SystemExit where a sweep is not whole.
    """
    enter = hydra.main(config_path=str(config_folder), config_name="config", version_base="1.3")(job)
    if sweep is None:
        enter()
        return
    if sweep.dry:
        for plan in sweep.plans:
            dry_run.show(plan)
        return
    broken = False
    try:
        with sweep.under_way():
            enter()
    except Exception:
        # Jobs raise nothing in a sweep, so this is the launcher's: a process that died, a cluster that is gone.
        traceback.print_exc()
        broken = True
        LOG.error("the launcher gave up; what a queue has may go on all the same: reprune-report status")
    if sweep.show_failures() or broken:
        raise SystemExit(FAILED)


def check_all(arguments: list[str]) -> Sweep | None:
    """Compose and check every job that the arguments stand for; the sweep, if they stand for one.

    Raises the first ConfigError.
    """
    jobs, multirun = command_of(arguments)
    composed = [compose_run(overrides) for overrides in jobs]
    if multirun:
        check_rules(composed)
    wanted = [one for one in composed if not (multirun and left_out(one))]
    # Composing is cheap and catches most slips; what follows imports torch and reads text.
    from reprune.check import check
    from reprune.sweep import Sweep

    quiet_libraries()
    if multirun and not composed[0].config["dry_run"]:
        check_queue(composed[0].launcher, composed[0].hydra["cluster"])
    plans = [check(one, here=not (multirun and one.sweep["elsewhere"])) for one in wanted]
    CHECKED.update({plan.composed.key: plan for plan in plans})
    return Sweep.of(plans, len(composed) - len(wanted), idle_rules(composed)) if multirun else None


if __name__ == "__main__":
    main()
