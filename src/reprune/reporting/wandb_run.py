"""The report as a W&B run: its tables and figures beside the runs they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd

from reprune.reporting.report import Report
from reprune.tracking.wandb_tracker import WandbTracking

MODES = ("offline", "online")


def log_report(report: Report, frame: pd.DataFrame, out: Path, mode: Literal["offline", "online"]) -> None:
    """Log every table as a W&B table and every drawn plot as an image to a run of job type 'report'.

    It lands in the project of the runs; offline files lie in `out/wandb` until `wandb sync` sends them.
    """
    import wandb

    tracking = WandbTracking(
        mode=mode, project=_of_runs(frame, "project") or "reprune", entity=_of_runs(frame, "entity")
    )
    name = f"report {out.resolve().parent.name}"
    run = tracking.open(name, "report", {"runs": list(frame["id"])}, out, job_type="report")
    code = 1
    try:
        for section in report.sections:
            table = section.table.rename(columns=str)
            run.log(
                {
                    f"tables/{section.name}": wandb.Table(
                        dataframe=table.astype(object).where(table.notna(), None)
                    )
                }
            )
        for plot in report.plots:
            if plot.figure is not None:
                run.log({f"figures/{plot.name}": wandb.Image(str(out / f"{plot.name}.png"))})
        code = 0
    finally:
        run.finish(exit_code=code)


def _of_runs(frame: pd.DataFrame, key: str) -> str | None:
    """What most of the runs were tracked with."""
    column = f"config/tracking.{key}"
    known = frame[column].dropna() if column in frame else pd.Series(dtype=object)
    return str(known.mode().iloc[0]) if len(known) else None
