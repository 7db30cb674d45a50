"""`reprune-report status DIR`: how far the runs below are. `reprune-report clean DIR`: the room that finished runs give back."""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.live import Live
from rich.prompt import Confirm
from rich.table import Table

from reprune.errors import ConfigError
from reprune.files import is_held, read_json
from reprune.reporting.comparisons import check_folders
from reprune.reporting.data_tables import print_whole
from reprune.reporting.frame import run_folders
from reprune.run_folder import HASH_LENGTH, RunFolder
from reprune.tracking.progress import CONSOLE
from reprune.waiting import PLACES, waiting

FREED = ("state", "activations")
COLOURS = {"done": "green", "running": "cyan", "failed": "red", "killed": "red", "interrupted": "yellow"}
ENDED = ("done", "failed", "killed", "interrupted", "not begun")
RUN = re.compile(rf"-[0-9a-f]{{{HASH_LENGTH}}}$")
STARTING_S = 60
SECONDS = {"d": 86400, "h": 3600, "min": 60}


def show_status(arguments: list[str]) -> None:
    """`status DIR… [--watch]`: a row a run folder, the counts below."""
    parser = argparse.ArgumentParser(
        prog="reprune-report status", description="How far the runs below a folder are, a row each."
    )
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--watch", action="store_true", help="again and again, until no run goes on")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often (default: 2)")
    given = parser.parse_args(arguments)
    check_folders(given.places)
    rows = status_rows(given.places)
    if not rows and not given.watch:
        raise _no_runs(given.places)
    if given.watch:
        with Live(_table(rows), console=CONSOLE, auto_refresh=False) as live:
            while any(row["state"] not in ENDED for row in rows) or not rows:
                time.sleep(given.every)
                rows = status_rows(given.places)
                live.update(_table(rows), refresh=True)
    else:
        print_whole(_table(rows))
    for row in rows:
        if row["error"]:
            CONSOLE.print(f"{row['id']}: {row['error']}", highlight=False, markup=False)
    CONSOLE.print(counts(rows), highlight=False)


def status_rows(places: Sequence[Path], now_s: float | None = None) -> list[dict[str, Any]]:
    """A row a run folder: id, state, block, num_blocks, seconds_left, since_s (unix time), error.

    `state` is done, running, failed, killed, interrupted, queued (a sweep that is under way comes to it), starting (a
    process took its folder and has written nothing yet) or not begun. `seconds_left` is for the blocks that are left, at
    the pace of those that this attempt did; None before the first of them and for runs that do not go on. What is not
    known is None.
    """
    now_s = time.time() if now_s is None else now_s
    begun = {path.parent for place in places for path in place.rglob("status.json")}
    # A run that has only its lock yet; other folders with locks have no hash in their names.
    locked = {path.parent for place in places for path in place.rglob(".lock")}
    queued = waiting(places)
    folders = begun | {path for path in locked if RUN.search(path.name)} | queued
    rows = [(path, _row(RunFolder(path), now_s)) for path in sorted(folders)]
    for path, row in rows:
        if row["state"] == "not begun" and path in queued:
            row["state"] = "queued"
        elif row["state"] == "not begun" and _is_starting(path / ".lock", now_s):
            row["state"] = "starting"
    return [row for _, row in rows] + _without_folders(places, {path for path, _ in rows})


def _without_folders(places: Sequence[Path], known: set[Path]) -> list[dict[str, Any]]:
    """Points of sweeps that failed before they had a run folder, by their runs or, where these are not known, their keys."""
    rows = []
    for note in sorted(note for place in places for note in place.rglob(".multirun/failed/*.json")):
        place = note.parents[1] / PLACES / note.name
        run = str(read_json(place)["run"]) if place.is_file() else f"point {note.stem[:HASH_LENGTH]}"
        if note.parents[2] / run not in known:
            nothing = dict.fromkeys(("block", "num_blocks", "seconds_left"))
            facts = {"since_s": note.stat().st_mtime, "error": read_json(note)["error"]}
            rows.append({"id": run, "state": "failed", **nothing, **facts})
    return rows


def _is_starting(lock: Path, now_s: float) -> bool:
    """Whether a process holds it, or may be about to: it is made a moment before it is taken."""
    return is_held(lock) or now_s - lock.stat().st_mtime < STARTING_S


def _row(folder: RunFolder, now_s: float) -> dict[str, Any]:
    state = folder.status().state
    facts = folder.facts()
    block: Any = facts.get("block")
    num_blocks: Any = facts.get("num_blocks")
    left: float | None = None
    begun_s: Any = facts.get("blocks_begun_s")
    first: Any = facts.get("first_block")
    # Status files of earlier versions do not say.
    known = block is not None and num_blocks is not None and begun_s is not None and first is not None
    if state == "running" and known and block > first:
        pace_s = (facts["unix_time_s"] - begun_s) / (block - first)
        left = max(0.0, facts["unix_time_s"] + pace_s * (num_blocks - block) - now_s)
    return {
        "id": folder.id,
        "state": {"finished": "done", "empty": "not begun"}.get(state, state),
        "block": num_blocks if state == "finished" else block,
        "num_blocks": num_blocks,
        "seconds_left": left,
        "since_s": facts.get("begun_s") if state == "running" else facts.get("unix_time_s"),
        "error": facts.get("error") if state == "failed" else None,
    }


def counts(rows: Sequence[dict[str, Any]]) -> str:
    """'3 done, 1 running', in the order of their numbers."""
    found = Counter(row["state"] for row in rows)
    return ", ".join(f"{number} {state}" for state, number in found.most_common()) or "no runs yet"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1))
    for head in ("run", "state", "block", "time left", "since"):
        table.add_column(head, justify="right" if head in ("block", "time left") else "left", no_wrap=True)
    for row in rows:
        block = "–" if row["block"] is None else f"{row['block']} of {row['num_blocks'] or '?'}"
        since = (
            "–" if row["since_s"] is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row["since_s"]))
        )
        colour = COLOURS.get(row["state"], "default")
        table.add_row(row["id"], f"[{colour}]{row['state']}", block, duration(row["seconds_left"]), since)
    return table


def duration(seconds: float | None) -> str:
    """Seconds in the largest unit that gives a whole number: '42 s', '3 min', '5 h', '2 d'; '–' for None."""
    if seconds is None:
        return "–"
    for unit, size in SECONDS.items():
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def clean(arguments: list[str]) -> None:
    """`clean DIR… [--yes]`: remove what finished runs need only to go on."""
    parser = argparse.ArgumentParser(
        prog="reprune-report clean",
        description="Remove the weights and activations that finished runs keep to go on (state/, activations/). "
        "Unfinished runs keep theirs.",
    )
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    given = parser.parse_args(arguments)
    check_folders(given.places)
    folders = run_folders(*given.places)
    if not folders:
        raise _no_runs(given.places)
    sizes = {folder.path: freeable_bytes(folder) for folder in folders}
    total = sum(sizes.values())
    if not total:
        CONSOLE.print("nothing to free: no finished run has a state/ or activations/", highlight=False)
        return
    some = [path for path, size in sizes.items() if size]
    without = [path for path in some if not (path / "model").is_dir()]
    CONSOLE.print(
        f"{total / 2**30:.2f} GiB in state/ and activations/ of {len(some)} finished runs", highlight=False
    )
    CONSOLE.print(
        "afterwards later evaluations need the exported model/"
        + (f", which {len(without)} of them do not have (export.model=true)" if without else "")
        + "; pruner=mask needs masks/ or model/",
        highlight=False,
    )
    if not given.yes and not Confirm.ask("remove them?", console=CONSOLE, default=False):
        CONSOLE.print("nothing was removed")
        return
    freed = sum(free(RunFolder(path)) for path in some)
    CONSOLE.print(f"{freed / 2**30:.2f} GiB freed", highlight=False)


def freeable_bytes(folder: RunFolder) -> int:
    """What `free` would give back; 0 for a run that is not finished."""
    if not folder.finished:
        return 0
    places = [folder.path / name for name in FREED]
    return sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())


def free(folder: RunFolder) -> int:
    """Remove state/ and activations/ of a finished run; the bytes it took. 0, and nothing gone, while a process holds the run."""
    lock = FileLock(folder.path / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        # A finished run that is evaluated anew reads its state.
        CONSOLE.print(f"{folder.id} is in use: left as it is", highlight=False, markup=False)
        return 0
    try:
        size = freeable_bytes(folder)
        for name in FREED if folder.finished else ():
            if (folder.path / name).is_dir():
                shutil.rmtree(folder.path / name)
        return size
    finally:
        lock.release()


def _no_runs(places: Sequence[Path]) -> ConfigError:
    return ConfigError("", f"no run folders below {', '.join(map(str, places))}", hint="run `reprune` first")
