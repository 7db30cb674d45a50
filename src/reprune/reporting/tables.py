"""The table of arms: reconstruction error against what the model can still do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd
from rich.table import Table

HELD_OUT = "probe"
EVALUATED = (
    ("perplexity", "perplexity/", ""),
    ("KL", "fidelity/", "/kl"),
    ("acc", "zero_shot/", "/acc"),
)
"""What of an evaluation is in the table: its heading, and what its names begin and end with."""


def arm_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a finished run: errors of the last block by text, the same relative, perplexities, seconds, memory.

    Column names are 'measure|text'. A text that one run trains on and another only measures is one column.
    """
    finished = frame[frame["state"] == "finished"]
    rows = []
    for _, run in finished.iterrows():
        row: dict[str, object] = {"arm": run["label"]}
        for family, measure in (("reconstruction", "error"), ("reconstruction_relative", "relative")):
            for role in ("calibration", HELD_OUT, "validation"):
                for column in names_between(finished.columns, f"{family}/{role}/", "/last"):
                    value = run[f"{family}/{role}/{column}/last"]
                    if pd.notna(value):
                        row[f"{measure}|{column}"] = value
        row |= _evaluated(finished.columns, "pruned", lambda name: run[name])  # noqa: B023 (called at once)
        row["|minutes"] = run["seconds"] / 60
        row["|GiB"] = run["peak_memory_bytes"] / 2**30
        rows.append(row)
    table = pd.DataFrame(rows)
    if len(table):
        table = pd.concat([_dense_rows(finished), table], ignore_index=True)
        order = [
            column
            for kind in ("arm", "error", "relative", *(kind for kind, *_ in EVALUATED), "")
            for column in table
            if _kind(str(column)) == kind
        ]
        table = table[order]
    return table


def _kind(column: str) -> str:
    return column.split("|")[0] if "|" in column else column


def names_between(columns: Iterable[str], prefix: str, suffix: str) -> list[str]:
    """What stands between prefix and suffix in the columns that have both."""
    return [
        column[len(prefix) : len(column) - len(suffix)]
        for column in columns
        if column.startswith(prefix) and column.endswith(suffix)
    ]


def _evaluated(columns: Iterable[str], which: str, value: Callable[[str], object]) -> dict[str, object]:
    """The evaluated metrics of the dense or the pruned model, by 'heading|name'."""
    columns = list(columns)
    return {
        f"{kind}|{name}": value(f"eval/{which}/{begin}{name}{end}")
        for kind, begin, end in EVALUATED
        for name in names_between(columns, f"eval/{which}/{begin}", end)
    }


def _dense_rows(finished: pd.DataFrame) -> pd.DataFrame:
    """A row for the dense model, or one for each model where there are several."""
    models = list(dict.fromkeys(finished["choice/model"]))
    rows = []
    for model in models:
        runs = finished[finished["choice/model"] == model]
        row: dict[str, object] = {"arm": "dense" if len(models) == 1 else f"dense {model}"}
        row |= _evaluated(finished.columns, "dense", lambda name: runs[name].dropna().mean())  # noqa: B023 (called at once)
        rows.append(row)
    return pd.DataFrame(rows)


def rich_table(table: pd.DataFrame, title: str) -> Table:
    """The arm table for a terminal: two header lines, numbers aligned, '–' for what is missing."""
    shown = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, padding=(0, 1))
    previous = None
    for column in table.columns:
        kind, _, name = column.partition("|")
        head = f"{kind if kind != previous else ''}\n{name}" if "|" in column else f"\n{column}"
        shown.add_column(head, justify="left" if column == "arm" else "right", no_wrap=True)
        previous = kind
    for _, row in table.iterrows():
        shown.add_row(*[_cell(column, row[column]) for column in table.columns])
    return shown


def _cell(column: str, value: object) -> str:
    if isinstance(value, str):
        return value
    number = float(value)  # type: ignore[arg-type]
    if pd.isna(number):
        return "–"
    if column.startswith(("relative", "acc", "KL")):
        return f"{number:.3f}"
    if column.startswith("|"):
        return f"{number:.1f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.3g}"
