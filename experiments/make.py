"""`make evidence`: from experiments/results/*.csv the verdicts on claims, the README's table of the evidence, figures, knees.

The runs themselves take hours: `reprune experiments=NAME` for each NAME of a table's last column.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

import reprune
from reprune.files import fill
from reprune.reporting.comparisons import claims_in
from reprune.reporting.drawing import STYLE, Runs
from reprune.reporting.knee import curves, knees
from reprune.reporting.plots import change_against_none, essential_sparsity
from reprune.reporting.verdicts import verdict_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README, FIGURE = ROOT / "experiments/results", ROOT / "README.md", ROOT / "docs/evidence.png"
PLACE = "make evidence"
ESSENTIAL, KNEES = RESULTS / "methods_essential_sparsity.csv", RESULTS / "essential_sparsity_knees.csv"
READ: dict[str, dict[str, tuple[str, ...]]] = {
    "evidence": {
        "main": ("main",),
        "longer": ("main", "longer"),
        **{name: ("main", name) for name in ("sequences", "generated", "pruners", "patterns", "stopping")},
        "gemma": ("gemma",),
    },
    "methods": {
        **{name: (name,) for name in ("pruners", "allocations", "refinements", "structured", "domain")},
        **{name: ("pruners", name) for name in ("mixed", "permutation", "regional")},
    },
}
"""By folder of experiments, which files of runs the claims of a file are about."""


def verdicts(group: str) -> pd.DataFrame:
    """A row a claim, of every claims file of a folder of experiments."""
    tables = []
    for claims, names in READ[group].items():
        files = [RESULTS / f"{group}_{name}.csv" for name in names]
        there = [file for file in files if file.is_file()]
        if there != files:
            print(
                f"{group}/claims_{claims}.yaml: no runs yet, {', '.join(file.name for file in files if file not in there)}"
            )
        else:
            frame = reprune.results(*files)
            tables.append(verdict_table(frame, claims_in(ROOT / f"experiments/{group}/claims_{claims}.yaml")))
    return pd.concat(tables, ignore_index=True)


def verdicts_file(group: str) -> Path:
    """Where the verdicts of a folder of experiments are kept."""
    return RESULTS / f"{group}_verdicts.csv"


def as_markdown(table: pd.DataFrame) -> str:
    """The verdicts as the README shows them: shares in percent, effects with their interval."""
    rows = [
        {
            "claim": row["claim"],
            "effect (95 % interval)": _effect(row),
            "needed": _needed(row),
            "sets": row["sets"],
            "verdict": f"**{row['verdict']}**" if row["verdict"] != "cannot say" else row["verdict"],
            "runs": ", ".join(f"`{name}`" for name in row["experiments"].split(", ")),
        }
        for row in table.sort_values("claim", kind="stable", key=lambda names: names.str[:3]).to_dict(
            "records"
        )
        if row["sets"]
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


def _share(row: dict[str, object]) -> bool:
    return row["measure"] == "reduction"


def _number(value: float, *, share: bool) -> str:
    return f"{100 * value:.1f} %" if share else f"{value:.3f}"


def _effect(row: dict[str, object]) -> str:
    values = [float(str(row[name])) for name in ("effect", "low", "high") if pd.notna(row[name])]
    mean, *interval = (_number(value, share=_share(row)) for value in values)
    return f"{mean} ({' to '.join(interval)})" if interval else mean


def _needed(row: dict[str, object]) -> str:
    side, _, value = str(row["threshold"]).partition(" ")
    return f"{side} {_number(float(value), share=_share(row)).replace('.0 %', ' %')}"


def main() -> None:
    """Write the verdicts, the figures, the knees, and the table between the README's marks."""
    tables = {group: verdicts(group) for group in READ}
    for group, table in tables.items():
        table.to_csv(verdicts_file(group), index=False)
    with mpl.rc_context(dict(STYLE)):
        figure = change_against_none.draw(Runs.of(reprune.results(RESULTS / "evidence_main.csv")))
        figure.savefig(FIGURE, dpi=110)
        essential = reprune.results(ESSENTIAL)
        knees(curves(essential)).to_csv(KNEES, index=False)
        essential_sparsity.draw(Runs.of(essential)).savefig(ROOT / "docs/essential_sparsity.png", dpi=110)
    fill(README, PLACE, as_markdown(tables["evidence"]))


if __name__ == "__main__":
    main()
