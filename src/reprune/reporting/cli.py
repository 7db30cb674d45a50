"""`reprune-report DIR…`: tables, plots and a page of the runs below; its other commands are in `COMMANDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pandas as pd
from rich.console import Console

from reprune.errors import require_positive
from reprune.exit_codes import exit_codes
from reprune.reporting.comparisons import (
    claims_in,
    frame_of,
    show_collect,
    show_differences,
    show_pairs,
    show_verdicts,
)
from reprune.reporting.knee import TOLERANCE
from reprune.reporting.report import write_report
from reprune.reporting.status import clean, show_status
from reprune.reporting.tables import arm_table, rich_table
from reprune.reporting.verdicts import AnyClaim
from reprune.reporting.wandb_run import MODES, log_report
from reprune.tracking.progress import CONSOLE

TITLE = "last block: error per element and per-token relative error; whole model: perplexity, and what else was evaluated"


COMMANDS = {
    "paired": show_pairs,
    "diff": show_differences,
    "verdicts": show_verdicts,
    "collect": show_collect,
    "status": show_status,
    "clean": clean,
}


def main() -> None:
    """Exit code 2 when there is nothing to report."""
    with exit_codes():
        command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
        if command is None:
            _report(sys.argv[1:])
        else:
            command(sys.argv[2:])


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="reprune-report",
        description="Tables and plots of finished runs.",
        epilog="others: reprune-report paired RUN RUN | diff RUN RUN | verdicts DIR --claims FILE | collect DIR --csv FILE | status DIR [--watch] | clean DIR (each has --help)",
    )
    parser.add_argument(
        "places",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="run folders, folders that hold some, or files of `collect`",
    )
    parser.add_argument("--out", type=Path, help="where the files go (default: DIR/report)")
    parser.add_argument("--svg", type=Path, help="also save the printed table as a picture")
    parser.add_argument(
        "--claims", type=Path, metavar="FILE", help="a YAML list of claims, for the page's verdicts"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="SHARE",
        help="what an essential sparsity may cost of the dense model's perplexity or acc (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--wandb", choices=MODES, nargs="?", const=MODES[0],
        help="also log tables and figures to a W&B run (default: offline)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    require_positive(**{"--tolerance": given.tolerance})
    claims = claims_in(given.claims) if given.claims else []
    frame = frame_of(given.places)
    first = given.places[0]
    out = first.with_name(f"{first.stem}_report") if first.is_file() else first / "report"
    _show(frame, given, given.out or out, claims)


def _show(frame: pd.DataFrame, given: argparse.Namespace, out: Path, claims: Sequence[AnyClaim]) -> None:
    table = arm_table(frame)
    places: list[Path] = given.places
    report = write_report(frame, table, out, places, claims, given.tolerance)
    if given.wandb:
        log_report(report, frame, out, given.wandb)
    if len(table):
        shown = rich_table(table, TITLE)
        # A table is as wide as its columns: a narrow pipe or log must not fold its numbers.
        width = max(CONSOLE.width, Console(width=1000).measure(shown).maximum)
        Console(width=width, soft_wrap=True).print(shown)
        if given.svg is not None:
            given.svg.parent.mkdir(parents=True, exist_ok=True)
            picture = Console(width=width, record=True, file=StringIO())
            picture.print(shown)
            picture.save_svg(str(given.svg), title="reprune-report")
    for _, run in frame[frame["state"] != "finished"].iterrows():
        CONSOLE.print(f"{run['id']}: {run['state']}", highlight=False, markup=False)
    places_of = {"run folders": ", ".join(map(str, places)), "page": str(out / "report.html")}
    if len(table):
        places_of |= {
            "tables": f"{out / 'arms.csv'}, summary.csv|md|tex, gap.csv, fitting.csv, correlations.csv, essential_sparsity.csv, runs.parquet",
            "plots": f"{out}/*.png, *.pdf",
        }
    left_out = [f"{plot.name} ({plot.reason})" for plot in report.plots if plot.figure is None]
    if left_out:
        places_of["not drawn"] = "; ".join(left_out)
    if given.wandb:
        places_of["W&B report"] = f"{out}/wandb  (wandb sync sends what was logged offline)"
    mirrored = sorted({path.parents[1] for place in places for path in place.glob("**/wandb/offline-run-*")})
    if mirrored:
        common = f"{mirrored[0].parent}/*/wandb"
        places_of["W&B files"] = f"{common}  (send them with: wandb sync {common}/offline-run-*)"
    for name, path in places_of.items():
        CONSOLE.print(f"{name:<12} {path}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
