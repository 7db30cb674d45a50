"""`reprune-report DIR…`: a table of the runs below, a plot of error by block, both as files too; `paired RUN RUN`."""

from __future__ import annotations

import argparse
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
from rich.console import Console

from reprune.errors import ConfigError
from reprune.exit_codes import exit_codes
from reprune.reporting.comparisons import check_folders, show_differences, show_pairs, show_verdicts
from reprune.reporting.frame import blocks, results
from reprune.reporting.replicates import summarise
from reprune.reporting.tables import arm_table, rich_table
from reprune.tracking.progress import CONSOLE

TITLE = "last block: error per element and per-token relative error; whole model: perplexity, and what else was evaluated"


COMMANDS = {"paired": show_pairs, "diff": show_differences, "verdicts": show_verdicts}


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
        epilog="others: reprune-report paired RUN RUN | diff RUN RUN | verdicts DIR --claims FILE (each has --help)",
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="run folders, or folders that hold some"
    )
    parser.add_argument("--out", type=Path, help="where the files go (default: DIR/report)")
    parser.add_argument("--svg", type=Path, help="also save the printed table as a picture")
    given = parser.parse_args(arguments)
    check_folders(given.places)
    frame = results(*given.places)
    if frame.empty:
        places = ", ".join(map(str, given.places))
        raise ConfigError("", f"no run folders below {places}", hint="run `reprune` first")
    _show(frame, given.places, given.out or given.places[0] / "report", given.svg)


def _show(frame: pd.DataFrame, places: list[Path], out: Path, svg: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "runs.csv", index=False)
    frame.to_parquet(out / "runs.parquet", index=False)
    unfinished = frame[frame["state"] != "finished"]
    table = arm_table(frame)
    if len(table):
        table.to_csv(out / "arms.csv", index=False)
        _write_summary(frame, out)
        shown = rich_table(table, TITLE)
        # A table is as wide as its columns: a narrow pipe or log must not fold its numbers.
        width = max(CONSOLE.width, Console(width=1000).measure(shown).maximum)
        Console(width=width, soft_wrap=True).print(shown)
        if svg is not None:
            svg.parent.mkdir(parents=True, exist_ok=True)
            picture = Console(width=width, record=True, file=StringIO())
            picture.print(shown)
            picture.save_svg(str(svg), title="reprune-report")
        rows = blocks(frame)
        rows.to_csv(out / "blocks.csv", index=False)
        from reprune.reporting.plots import error_by_block

        error_by_block(rows, out / "error_by_block.png")
    for _, run in unfinished.iterrows():
        CONSOLE.print(f"{run['id']}: {run['state']}", highlight=False)
    places_of = {
        "run folders": ", ".join(map(str, places)),
        "tables": f"{out / 'arms.csv'}, summary.csv|md|tex, runs.parquet",
        "plot": f"{out / 'error_by_block.png'}",
    }
    mirrored = sorted({path.parents[1] for place in places for path in place.glob("**/wandb/offline-run-*")})
    if mirrored:
        common = f"{mirrored[0].parent}/*/wandb"
        places_of["W&B files"] = f"{common}  (send them with: wandb sync {common}/offline-run-*)"
    for name, path in places_of.items():
        CONSOLE.print(f"{name:<12} {path}", highlight=False, markup=False)


def _write_summary(frame: pd.DataFrame, out: Path) -> None:
    """A row an arm, mean and standard deviation over calibration sets, as CSV, Markdown and LaTeX."""
    families = ("eval/pruned/", "reconstruction/", "reconstruction_relative/")
    metrics = [
        column
        for column in frame.columns
        if column.startswith(families) and "_evaluation_noise/" not in column
    ]
    summary = summarise(frame, metrics)
    summary.to_csv(out / "summary.csv", index=False)
    (out / "summary.md").write_text(summary.to_markdown(index=False, floatfmt=".4g"), encoding="utf-8")
    latex = summary.to_latex(index=False, float_format="%.4g", escape=True)
    (out / "summary.tex").write_text(latex, encoding="utf-8")


if __name__ == "__main__":
    main()
