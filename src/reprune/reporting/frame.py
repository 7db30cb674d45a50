"""Run folders → one tidy frame, a row a run; and one with a row a block, text and moment."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from reprune.errors import ConfigError
from reprune.files import read_json, write_atomically
from reprune.reporting.replicates import with_words
from reprune.run_folder import RunFolder

KEPT = "a file that `reprune-report collect` wrote"
ELSEWHERE = ("output_dir=", "tracking", "launcher=", "hydra.", "hydra/", "sweep.", "wandb.")
PLACES = ("folder", "label", "config/output_dir")
LATER = {"training_dtype": "float32", "last_layer_iterations": 0}
"""Fields of a technique that came when there were runs already, and what those did."""
ABSOLUTE = re.compile(r"""^(~?/|[A-Za-z]:\\).+$|(?<![\w.:/])(~?/|[A-Za-z]:\\)[^\s,'"\]}]+""")

# libyaml's loader is ten times as fast, and not in every build of PyYAML.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def run_folders(*places: Path) -> list[RunFolder]:
    """Every run folder at or below the given places, in the order of their first write."""
    found = {path.parent for place in places for path in place.rglob("config.yaml")}
    found = {folder for folder in found if (folder / "status.json").is_file()}
    return [
        RunFolder(path)
        for path in sorted(found, key=lambda path: ((path / "config.yaml").stat().st_mtime, path))
    ]


def results(*places: Path | str) -> pd.DataFrame:
    """A row a run: id, state, config as `config/KEY`, choices as `choice/GROUP`, metrics, sparsity, seconds, memory,
    how many sequences it reconstructed on, and its command. A place is a folder, or a file that `collect` wrote.

    Metrics have their own names; lists of the config are JSON.
    Units are in the names; what a run does not have is missing, never zero, but for fields of `LATER`.
    """
    given = [Path(place) for place in places]
    kept = [read_frame(place) for place in given if place.is_file()]
    rows = [_row(folder) for folder in run_folders(*(place for place in given if not place.is_file()))]
    frame = pd.DataFrame(rows)
    if kept:
        # A file does not tell None from NaN, so that here nothing does.
        frame = pd.concat(
            [frame.astype(object).where(frame.notna()).infer_objects(), *kept], ignore_index=True
        )
    # A wide file is read in pieces, which pandas complains of when columns are added.
    frame = _with_later_fields(_once(frame).copy())
    if "choice/reconstruction" in frame:
        frame["label"] = frame["choice/reconstruction"]
        if "choice/arm" in frame:
            frame["label"] = frame["choice/arm"].where(frame["choice/arm"].notna(), frame["label"])
        # Runs of one technique are told apart by these; then by the beginning of their hash.
        frame["label"] = with_words(frame["label"], frame, "pruner", "pattern", "transform")
        twice = frame["label"].duplicated(keep=False) & frame["label"].notna()
        frame.loc[twice, "label"] += " " + frame.loc[twice, "config_hash"].str[:5]
    return frame


def _with_later_fields(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame in which runs from before a field was there, whose record has none of it, are like those with its default."""
    if "config/reconstruction.epochs" in frame:
        for field, value in LATER.items():
            name = f"config/reconstruction.{field}"
            column = frame[name] if name in frame else pd.Series(None, index=frame.index, dtype=object)
            frame[name] = column.where(column.notna() | frame["config/reconstruction.epochs"].isna(), value)
    return frame


def _once(frame: pd.DataFrame) -> pd.DataFrame:
    """A run in several places is one run: finished where it is anywhere, with what any finished record of it has."""
    if frame.empty or not frame["id"].duplicated().any():
        return frame
    finished = frame["state"] == "finished"
    twice = frame["id"].isin(frame.loc[finished, "id"])
    # The first values of text columns come in pieces, which pandas complains of when the ids are put beside them.
    return frame[finished | ~twice].groupby("id", sort=False).first().copy().reset_index()[list(frame)]


def _row(folder: RunFolder) -> dict[str, Any]:
    row: dict[str, Any] = {"id": folder.id, "folder": str(folder.path), "state": folder.status().words}
    config = yaml.load((folder.path / "config.yaml").read_text(encoding="utf-8"), Loader=LOADER)
    row |= {f"config/{key}": value for key, value in _leaves(config)}
    # Null stands for `seed`; which draw it was decides what is a replicate of what.
    for seed in ("seed_data", "seed_training"):
        row[f"config/{seed}"] = config["seed"] if config[seed] is None else config[seed]
    if not folder.finished:
        return row
    result = read_json(folder.path / "result.json")
    choices = {group: option for group, option in result["choices"].items() if not group.startswith("hydra/")}
    row["command"] = _command(read_json(folder.path / "environment.json").get("overrides"))
    row |= {"experiment": result["experiment"], "config_hash": result["config_hash"]}
    row |= {f"choice/{group}": option or None for group, option in choices.items()}
    row |= result["metrics"]
    sizes = [
        text.get("num_sequences") for text in result["identity"]["texts"] if text["use"] == "reconstruction"
    ]
    if sizes and None not in sizes:
        row["reconstruction_sequences"] = sum(sizes)
    row["sparsity"] = result["sparsity"]["total"]
    row |= {f"transform/{key}": value for key, value in _leaves(result.get("transform", {}))}
    row["seconds"] = sum(result["seconds"].values())
    row |= {f"seconds/{stage}": value for stage, value in result["seconds"].items()}
    row["peak_memory_bytes"] = max(result["peak_memory_bytes"].values())
    return row


def _command(overrides: Sequence[str] | None) -> str | None:
    """What makes the run again, without what says where it goes and how it is launched; None for runs that do not say."""
    if overrides is None:
        return None
    return shlex.join(
        ["reprune", *(item for item in overrides if not item.lstrip("+~").startswith(ELSEWHERE))]
    )


def collect(frame: pd.DataFrame, file: Path) -> None:
    """Write the finished runs of `results` as a CSV file that `results` reads.

    It names no place of this machine: of a path is left the name and a hash, which tells two of one name apart.
    """
    finished = frame[frame["state"] == "finished"].sort_values(["experiment", "config_hash"])
    kept = finished.drop(columns=[name for name in PLACES if name in finished])
    for column in kept.select_dtypes(include=["object", "string"]):
        kept[column] = kept[column].map(_without_places, na_action="ignore")
    empty = [name for name in kept if not str(name).startswith(("config/", "choice/", "command"))]
    kept = kept.drop(columns=[name for name in empty if kept[name].isna().all()])
    write_atomically(file, lambda temporary: kept.to_csv(temporary, index=False))


def _without_places(value: object) -> object:
    """A path, or the paths in a list or a command, by name and hash."""

    def shortened(found: re.Match[str]) -> str:
        path = found[0]
        return f"{Path(path).name}#{hashlib.sha256(path.encode()).hexdigest()[:8]}"

    if not isinstance(value, str):
        return value
    if not value.startswith("reprune"):
        return ABSOLUTE.sub(shortened, value)
    words = [word.partition("=") for word in shlex.split(value)]
    return shlex.join(key + equals + ABSOLUTE.sub(shortened, text) for key, equals, text in words)


def read_frame(file: Path) -> pd.DataFrame:
    """What `collect` wrote. ConfigError for another file."""
    try:
        frame = pd.read_csv(
            file,
            low_memory=False,
            keep_default_na=False,
            na_values=[""],
            dtype={"id": str, "config_hash": str},
        )
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError("", f"cannot be read: {error}", value=file, accepted=KEPT) from error
    missing = [name for name in ("id", "state", "config_hash") if name not in frame]
    if missing:
        raise ConfigError("", f"has no column {', '.join(missing)}", value=file, accepted=KEPT)
    # A file and a machine have no folders in common.
    return frame.copy().assign(folder=None)


def _leaves(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested config by its dotted key."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", json.dumps(value) if isinstance(value, list) else value


def block_records(frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """The rows of blocks.jsonl of every finished run in `results` whose folder is there, by run id."""
    finished = frame[frame["state"] == "finished"]
    return {
        run["id"]: RunFolder(Path(run["folder"])).blocks()
        for run in finished[["id", "folder"]].to_dict("records")
        if isinstance(run["folder"], str)
    }


def blocks(frame: pd.DataFrame, records: Mapping[str, list[dict[str, Any]]] | None = None) -> pd.DataFrame:
    """A row a block, text and moment of every finished run in `results`: label, block, role, text, error, relative.

    `records` are `block_records(frame)` where they were read already.
    """
    rows = []
    labels = dict(zip(frame["id"], frame["label"], strict=True)) if "label" in frame else {}
    for run, run_blocks in (block_records(frame) if records is None else records).items():
        for block in run_blocks:
            place = {"id": run, "label": labels[run], "block": block["block"]}
            for moment in ("before", "after"):
                for role, texts in block[moment].items():
                    for text, errors in texts.items():
                        rows.append({**place, "moment": moment, "role": role, "text": text, **errors})
    return pd.DataFrame(rows)
