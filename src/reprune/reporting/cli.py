"""`reprune-report DIR…`: a table of the runs below, a plot of error by block, both as files too; `paired RUN RUN`."""

from __future__ import annotations

import argparse
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from reprune.errors import ConfigError
from reprune.exit_codes import exit_codes
from reprune.reporting.data_tables import print_whole
from reprune.reporting.frame import blocks, results
from reprune.reporting.paired import paired
from reprune.reporting.tables import arm_table, rich_table
from reprune.tracking.progress import CONSOLE

TITLE = "last block: error per element and per-token relative error; whole model: perplexity, and what else was evaluated"


def main() -> None:
    """Exit code 2 when there is nothing to report."""
    with exit_codes():
        if sys.argv[1:2] == ["paired"]:
            _paired(sys.argv[2:])
        else:
            _report(sys.argv[1:])


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="reprune-report",
        description="Tables and plots of finished runs; `reprune-report paired RUN RUN` compares two example by example.",
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="run folders, or folders that hold some"
    )
    parser.add_argument("--out", type=Path, help="where the files go (default: DIR/report)")
    parser.add_argument("--svg", type=Path, help="also save the printed table as a picture")
    given = parser.parse_args(arguments)
    _check_folders(given.places)
    frame = results(*given.places)
    if frame.empty:
        places = ", ".join(map(str, given.places))
        raise ConfigError("", f"no run folders below {places}", hint="run `reprune` first")
    _show(frame, given.places, given.out or given.places[0] / "report", given.svg)


def _paired(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="reprune-report paired",
        description="Two runs on the same questions: what one had right and the other has not.",
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    _check_folders(given.runs)
    frame = paired(*given.runs)
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1))
    for column in frame.columns:
        table.add_column(column, justify="left" if column in ("task", "filter") else "right", no_wrap=True)
    for _, row in frame.iterrows():
        table.add_row(*[_number(value) for value in row])
    print_whole(table)
    first, second = (run.resolve().name for run in given.runs)
    CONSOLE.print(f"first   {first}\nsecond  {second}", highlight=False, markup=False)
    CONSOLE.print("difference: second − first, 95 % interval over examples; p: McNemar's exact test, a task each", highlight=False)  # fmt: skip
    if given.csv is not None:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(given.csv, index=False)
        CONSOLE.print(f"table   {given.csv}", highlight=False, markup=False)


def _number(value: object) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3f}"
    return "–" if value is None else str(value)


def _check_folders(places: list[Path]) -> None:
    missing = [str(place) for place in places if not place.is_dir()]
    if missing:
        raise ConfigError("", f"no such folder: {', '.join(missing)}")


def _show(frame: pd.DataFrame, places: list[Path], out: Path, svg: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "runs.csv", index=False)
    unfinished = frame[frame["state"] != "finished"]
    table = arm_table(frame)
    if len(table):
        table.to_csv(out / "arms.csv", index=False)
        shown = rich_table(table, TITLE)
        # A table is as wide as its columns: a narrow pipe or log must not fold its numbers.
        width = max(CONSOLE.width, Console(width=1000).measure(shown).maximum)
        Console(width=width, soft_wrap=True).print(shown)
        if svg is not None:
            picture = Console(width=width, record=True, file=StringIO())
            picture.print(shown)
            picture.save_svg(str(svg), title="reprune-report")
        rows = blocks(frame)
        rows.to_csv(out / "blocks.csv", index=False)
        from reprune.reporting.plots import error_by_block

        error_by_block(rows, out / "error_by_block.png")
    for _, run in unfinished.iterrows():
        CONSOLE.print(f"{run['id']}: {run['state']}", highlight=False)
    for name, path in (
        ("run folders", ", ".join(map(str, places))),
        ("tables", out / "arms.csv"),
        ("plot", out / "error_by_block.png"),
        ("W&B files", f"{places[0]}/*/wandb  (send them with: wandb sync {places[0]}/*/wandb/offline-run-*)"),
    ):
        CONSOLE.print(f"{name:<12} {path}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
