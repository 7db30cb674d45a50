"""`reprune-report paired|diff|verdicts`: runs held against each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.table import Table

from reprune.build import build
from reprune.errors import ConfigError
from reprune.reporting.data_tables import print_whole
from reprune.reporting.frame import collect, results
from reprune.reporting.paired import paired, paired_texts
from reprune.reporting.verdicts import AnyClaim, Claim, RankClaim, unmatched, verdict_table
from reprune.tracking.progress import CONSOLE

TEXT_COLUMNS = ("task", "filter", "claim", "metric", "measure", "threshold", "verdict", "experiments", "what")


def check_folders(places: Sequence[Path]) -> None:
    """ConfigError for a folder that is not there."""
    missing = [str(place) for place in places if not place.is_dir()]
    if missing:
        raise ConfigError("", f"no such folder: {', '.join(missing)}")


def check_places(places: Sequence[Path]) -> None:
    """ConfigError for a folder or file that is not there."""
    missing = [str(place) for place in places if not place.exists()]
    if missing:
        raise ConfigError("", f"no such folder or file: {', '.join(missing)}")


def show_collect(arguments: list[str]) -> None:
    """`collect DIR… --csv FILE`: the runs as one file that reports read as they read folders."""
    parser = argparse.ArgumentParser(
        prog="reprune-report collect",
        description="Write finished runs, a row each with its command, config and metrics, to a file to keep and to share: "
        "it names no place of this machine, and reprune-report reads it in place of the folders.",
    )
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="run folders, or such files")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(arguments)
    frame = frame_of(given.places)
    finished = int((frame["state"] == "finished").sum())
    if not finished:
        raise ConfigError("", "no run is finished", value=", ".join(sorted(set(frame["state"]))))
    collect(frame, given.csv)
    CONSOLE.print(f"table   {given.csv}, {finished} runs", highlight=False, markup=False)


def frame_of(places: Sequence[Path]) -> pd.DataFrame:
    """The runs of folders and files. ConfigError where there are none."""
    check_places(places)
    frame = results(*places)
    if frame.empty:
        raise ConfigError("", f"no run folders below {', '.join(map(str, places))}", hint="run `reprune` first")  # fmt: skip
    return frame


def show_pairs(arguments: list[str]) -> None:
    """`paired RUN RUN`: a row a task, and a row a text."""
    parser = argparse.ArgumentParser(
        prog="reprune-report paired",
        description="Two runs on the same questions and the same windows: what differs, pair by pair.",
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    check_folders(given.runs)
    for run in given.runs:
        if not (run / "evaluations").is_dir():
            raise ConfigError("RUN", "this is no run that was evaluated", value=run, accepted="a run's folder", hint="reprune-eval RUN evaluation=…")  # fmt: skip
    texts = paired_texts(*given.runs)
    try:
        frame = paired(*given.runs)
    except ConfigError:
        if texts.empty:
            raise
        frame = pd.DataFrame()
    first, second = (run.resolve().name for run in given.runs)
    CONSOLE.print(f"first   {first}\nsecond  {second}", highlight=False, markup=False)
    if len(frame):
        _print(frame)
        CONSOLE.print("difference: second − first, 95 % interval over examples; p: McNemar's exact test, a task each", highlight=False)  # fmt: skip
        _write(frame, given.csv)
    if len(texts):
        _print(texts)
        CONSOLE.print("difference: of the mean loss, nats a token, second − first, 95 % interval over windows", highlight=False)  # fmt: skip
        _write(texts, given.csv.with_stem(f"{given.csv.stem}_texts") if given.csv else None)


def show_differences(arguments: list[str]) -> None:
    """`diff RUN RUN`: what of config and metrics differs between two runs."""
    parser = argparse.ArgumentParser(
        prog="reprune-report diff", description="What of config and metrics differs between two runs."
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    check_folders(given.runs)
    frame = differences(*given.runs)
    if frame.empty:
        CONSOLE.print("they differ in nothing but their folders and times", highlight=False)
    else:
        _print(frame)
    _write(frame, given.csv)


def differences(first: Path, second: Path) -> pd.DataFrame:
    """A row for every config key and metric that differs: what, first, second; folders, times and memory left out.

    ConfigError where either is not one run.
    """
    rows = []
    for place in (first, second):
        frame = results(place)
        if len(frame) != 1:
            raise ConfigError(
                "RUN", f"holds {len(frame)} runs", value=place, accepted="the folder of one run"
            )
        rows.append(
            {name: value for name, value in frame.iloc[0].to_dict().items() if not _incidental(str(name))}
        )
    one, other = rows
    names = [name for name in dict.fromkeys([*one, *other]) if not _equal(one.get(name), other.get(name))]
    found = [{"what": name, "first": one.get(name), "second": other.get(name)} for name in names]
    return pd.DataFrame(found, columns=["what", "first", "second"])


def _incidental(name: str) -> bool:
    left_out = (
        "id",
        "folder",
        "label",
        "command",
        "config_hash",
        "config/output_dir",
        "seconds",
        "peak_memory_bytes",
    )
    return name in left_out or name.startswith("seconds/")


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other or (pd.isna(one) and pd.isna(other)))


def show_verdicts(arguments: list[str]) -> None:
    """`verdicts DIR… --claims FILE`: a row a claim."""
    parser = argparse.ArgumentParser(
        prog="reprune-report verdicts",
        description="What runs say of claims: paired by calibration set, 95 % t interval against a threshold.",
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="run folders, or files of `collect`"
    )
    parser.add_argument("--claims", type=Path, required=True, metavar="FILE", help="a YAML list of claims")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    claims = claims_in(given.claims)
    frame = frame_of(given.places)
    table = verdict_table(frame, claims)
    _print(table)
    for line in unmatched(frame, claims):
        CONSOLE.print(line, highlight=False, markup=False)
    _write(table, given.csv)


def claims_in(file: Path) -> list[AnyClaim]:
    """The claims of a YAML file: a list of mappings with the fields of Claim or, with `ranks_as`, of RankClaim.

    ConfigError for what is none.
    """
    if not file.is_file():
        raise ConfigError("--claims", "no such file", value=file, accepted="a YAML list of claims")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError("--claims", f"cannot be read: {str(error).splitlines()[0]}", value=file) from error
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ConfigError("--claims", "is not a list of claims", value=file, accepted="- name: …, metric: …, arm: …, against: …, side: above|below")  # fmt: skip
    kinds = [RankClaim if "ranks_as" in item else Claim for item in content]
    return [
        build({"_target_": f"{kind.__module__}.{kind.__qualname__}", **item}, f"claims.{number}")
        for number, (kind, item) in enumerate(zip(kinds, content, strict=True))
    ]


def _print(frame: pd.DataFrame) -> None:
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1))
    for column in frame.columns:
        table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True)
    for _, row in frame.iterrows():
        table.add_row(*[_cell(value) for value in row])
    print_whole(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.4g}"
    return "–" if value is None else str(value)


def _write(frame: pd.DataFrame, file: Path | None) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(file, index=False)
        CONSOLE.print(f"table   {file}", highlight=False, markup=False)
