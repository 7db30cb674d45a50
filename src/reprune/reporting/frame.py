"""Run folders → one tidy frame, a row a run; and one with a row a block, text and moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from reprune.files import read_json
from reprune.run_folder import RunFolder


def run_folders(*places: Path) -> list[RunFolder]:
    """Every run folder at or below the given places, in the order of their first write."""
    found = {path.parent for place in places for path in place.rglob("status.json")}
    return [
        RunFolder(path)
        for path in sorted(found, key=lambda path: ((path / "config.yaml").stat().st_mtime, path))
    ]


def results(*places: Path | str) -> pd.DataFrame:
    """A row a run: id, state, choices as `choice/GROUP`, metrics under their own names, sparsity, seconds, memory.

    Units are in the names; what a run does not have is missing, never zero.
    """
    return pd.DataFrame([_row(folder) for folder in run_folders(*map(Path, places))])


def _row(folder: RunFolder) -> dict[str, Any]:
    row: dict[str, Any] = {"id": folder.id, "folder": str(folder.path), "state": folder.status().words}
    if not folder.finished:
        return row
    result = read_json(folder.path / "result.json")
    choices = {group: option for group, option in result["choices"].items() if not group.startswith("hydra/")}
    row |= {"experiment": result["experiment"], "config_hash": result["config_hash"]}
    row |= {f"choice/{group}": option or None for group, option in choices.items()}
    row |= result["metrics"]
    row["sparsity"] = result["sparsity"]["total"]
    row["seconds"] = sum(result["seconds"].values())
    row |= {f"seconds/{stage}": value for stage, value in result["seconds"].items()}
    row["peak_memory_bytes"] = max(result["peak_memory_bytes"].values())
    return row


def blocks(*places: Path | str) -> pd.DataFrame:
    """A row a run, block, text and moment: id, arm, block, role, text, moment, error, relative."""
    rows = []
    for folder in run_folders(*map(Path, places)):
        if not folder.finished:
            continue
        name = label_of(read_json(folder.path / "result.json")["choices"])
        for block in folder.blocks():
            for moment in ("before", "after"):
                for role, texts in block[moment].items():
                    for text, errors in texts.items():
                        place = {"id": folder.id, "arm": name, "block": block["block"], "moment": moment}
                        rows.append({**place, "role": role, "text": text, **errors})
    return pd.DataFrame(rows)


def label_of(choices: dict[str, str]) -> str:
    """What a run is called in tables: its arm, else its reconstruction option."""
    return choices.get("arm") or choices.get("reconstruction", "?")
