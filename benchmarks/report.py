"""How long `reprune-report` takes for many finished runs: tables, plots and the page, in a process of its own.

One tiny run of each technique is real; the others are copies with another seed or calibration set, id and metrics, laid
out as the runs of a sweep with three blocks. Timed is the whole command, imports included, several times over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import yaml

TECHNIQUES = ("none", "br", "br_gp", "br_gp_cr")
TINY = (
    "model=tiny", "calibration=vocabulary", "calibration.num_sequences=3", "calibration.length=16",
    "~calibration@probes.wiki", "~calibration@probes.code", "evaluation=none", "tracking=jsonl", "threads=1",
)  # fmt: skip


def main() -> None:
    """Make the runs, report on them, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the model that the copies tell of")
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        made = make_runs(Path(place) / "runs", given.runs, given.blocks)
        seconds = []
        for _ in range(given.times):
            begun = time.perf_counter()
            command = [sys.executable, "-m", "reprune.reporting.cli", str(Path(place) / "runs")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begun)
        told = ", ".join(f"{one:.1f}" for one in seconds)
        load = os.getloadavg()[0]
        print(f"{made} runs of {given.blocks} blocks: median {median(seconds):.1f} s of {told} s")
        print(f"{os.cpu_count()} cores, load {load:.1f} when it ended")


def make_runs(folder: Path, count: int, num_blocks: int) -> int:
    """`count` finished runs below `folder`: every technique on every calibration set. Returns how many there are."""
    stream = np.random.default_rng(0)
    for technique in TECHNIQUES:
        epochs = [] if technique == "none" else ["reconstruction.epochs=3"]
        command = [sys.executable, "-m", "reprune.run", *TINY, f"reconstruction={technique}", *epochs]
        subprocess.run([*command, f"output_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    real = {path: json.loads((path / "result.json").read_text()) for path in sorted(folder.iterdir())}
    for number in range(count - len(real)):
        path, result = list(real.items())[number % len(real)]
        _copy(path, result, 1 + number // len(real), number, num_blocks, stream)
    for path in real:
        _lengthen(path, num_blocks)
    return sum(1 for _ in folder.glob("*/result.json"))


def _copy(
    path: Path,
    result: dict[str, object],
    set_: int,
    number: int,
    num_blocks: int,
    stream: np.random.Generator,
) -> None:
    target = path.with_name(f"{path.name.rpartition('-')[0]}-{number:012x}")
    shutil.copytree(path, target, ignore=shutil.ignore_patterns("state"))
    metrics = {name: value * float(stream.uniform(0.5, 2)) for name, value in result["metrics"].items()}  # type: ignore[attr-defined]
    metrics |= {
        f"eval/pruned/perplexity/{text}": float(stream.uniform(20, 60)) for text in ("web", "wiki", "code")
    }
    changed = {**result, "id": target.name, "config_hash": f"{number:012x}", "metrics": metrics}
    (target / "result.json").write_text(json.dumps(changed))
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["calibration"]["set"] = set_
    (target / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _lengthen(target, num_blocks)


def _lengthen(path: Path, num_blocks: int) -> None:
    """Tell of `num_blocks` blocks by repeating those there are."""
    rows = [json.loads(line) for line in (path / "blocks.jsonl").read_text().splitlines()]
    longer = []
    for block in range(num_blocks):
        row = rows[block % len(rows)]
        training = [{**one, "window": block} for one in row["training"]]
        longer.append({**row, "block": block, "training": training})
    (path / "blocks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))


if __name__ == "__main__":
    main()
