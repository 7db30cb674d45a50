"""`reprune-report DIR…`: a table of the runs below, a plot of error by block, both as files too."""

from __future__ import annotations

import argparse
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
from rich.console import Console

from reprune.reporting.frame import blocks, results
from reprune.reporting.tables import arm_table, rich_table
from reprune.tracking.progress import CONSOLE

TITLE = "last block: error per element and per-token relative error; whole model: perplexity"


def main() -> None:
    """Exit code 2 when there is nothing to report."""
    parser = argparse.ArgumentParser(prog="reprune-report", description="Tables and plots of finished runs.")
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="run folders, or folders that hold some"
    )
    parser.add_argument("--out", type=Path, help="where the files go (default: DIR/report)")
    parser.add_argument("--svg", type=Path, help="also save the printed table as a picture")
    given = parser.parse_args()
    missing = [str(place) for place in given.places if not place.is_dir()]
    if missing:
        print(f"no such folder: {', '.join(missing)}", file=sys.stderr)
        raise SystemExit(2)
    frame = results(*given.places)
    if frame.empty:
        print(
            f"no run folders below {', '.join(map(str, given.places))}: run `reprune` first", file=sys.stderr
        )
        raise SystemExit(2)
    _show(frame, given.places, given.out or given.places[0] / "report", given.svg)


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
