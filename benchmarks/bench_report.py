"""How long `reprune-report` takes for many finished runs: tables, plots and the page, in a process of its own.

One tiny run of each technique is real; the others are copies with another seed or calibration set, id and metrics, laid
out as the runs of a sweep with three blocks. Timed is the whole command, imports included, several times over. Its floor is a process that imports the libraries it
draws with, and reads and parses every file of the runs that it reads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import yaml
from timing import Measure, Rows, Seconds, against

NUM_BLOCKS = 32
TECHNIQUES = ("none", "br", "br_gp", "br_gp_cr")
TINY = (
    "model=tiny", "calibration=vocabulary", "calibration.num_sequences=3", "calibration.length=16",
    "~calibration@probes.wiki", "~calibration@probes.code", "evaluation=none", "tracking=jsonl", "threads=1",
)  # fmt: skip

READING = "reading"
READ = """
import json, sys
from pathlib import Path
import matplotlib.pyplot, pandas, yaml
from rich.console import Console
for run in Path(sys.argv[1]).iterdir():
    if (run / "result.json").is_file():
        json.loads((run / "result.json").read_text())
        [json.loads(line) for line in (run / "blocks.jsonl").read_text().splitlines()]
        yaml.load((run / "config.yaml").read_text(), yaml.CSafeLoader)
"""

SETTINGS = ("runs",)
CHILDREN = True


def arms(config: pytest.Config) -> list[str]:
    """The command as it is, and what it cannot do without."""
    return [READING, "report"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of the runs."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    assert make_runs(folder, request.config.getoption("runs"), NUM_BLOCKS) == request.config.getoption("runs")
    return folder


def test_report(arm: str, runs: Path, measure: Measure) -> None:
    """One report."""
    report = ["-m", "reprune.reporting.cli", str(runs)]
    command = [sys.executable, *(["-c", READ, str(runs)] if arm == READING else report)]
    measure(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def test_table(seconds: Seconds, told: Rows, request: pytest.FixtureRequest) -> None:
    """What the rounds come to."""
    took = seconds["report"]
    told.append(
        {
            "runs": request.config.getoption("runs"),
            "blocks": NUM_BLOCKS,
            "seconds": median(took),
            "share": 1 / against(seconds, READING)["report"],
            "lowest": min(took),
            "highest": max(took),
        }
    )


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
