"""`reprune-report DIR…`: a table of the runs below, a plot of error by block, both as files too."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reprune.reporting.frame import blocks, results
from reprune.reporting.tables import arm_table, rich_table
from reprune.tracking.progress import CONSOLE


def main() -> None:
    """Exit code 2 when there is nothing to report."""
    parser = argparse.ArgumentParser(prog="reprune-report", description="Tables and plots of finished runs.")
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="run folders, or folders that hold some"
    )
    parser.add_argument("--out", type=Path, help="where the files go (default: DIR/report)")
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
    _show(frame, given.places, given.out or given.places[0] / "report")


def _show(frame: object, places: list[Path], out: Path) -> None:
    import pandas as pd

    assert isinstance(frame, pd.DataFrame)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "runs.csv", index=False)
    unfinished = frame[frame["state"] != "finished"]
    table = arm_table(frame)
    if len(table):
        table.to_csv(out / "arms.csv", index=False)
        CONSOLE.print(rich_table(table, "errors of the last block; perplexity of the whole model"))
        rows = blocks(*places)
        rows.to_csv(out / "blocks.csv", index=False)
        from reprune.reporting.plots import error_by_block

        error_by_block(rows, out / "error_by_block.png")
    for _, run in unfinished.iterrows():
        CONSOLE.print(f"{run['id']}: {run['state']}", highlight=False)
    for name, path in (
        ("run folders", ", ".join(map(str, places))),
        ("tables", out / "arms.csv"),
        ("plot", out / "error_by_block.png"),
        ("W&B files", f"{places[0]}/*/wandb  (send them with: wandb sync --sync-all)"),
    ):
        CONSOLE.print(f"{name:<12} {path}", highlight=False, markup=False)
