"""What several test files share: tiny runs, texts made on the spot, the bytes a run leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open

from reprune.check import check
from reprune.compose import compose_run
from reprune.pipeline import run
from reprune.run_plan import RunPlan

TINY = (
    "model=tiny",
    "calibration=vocabulary",
    "calibration.num_sequences=3",
    "calibration.length=16",
    "~calibration@probes.wiki",
    "~calibration@probes.code",
    "reconstruction.epochs=1",
    "reconstruction.batch_size=2",
    "evaluation=none",
    "tracking=jsonl",
    "threads=1",
)
"""A run of a random 3-block model on random tokens: a fraction of a second, no files but the run folder."""


def overrides_for(output_dir: Path, *more: str) -> list[str]:
    """The overrides of a tiny run; later ones win."""
    return [*TINY, f"output_dir={output_dir}", *more]


def plan_of(output_dir: Path, *more: str) -> RunPlan:
    """The checked plan of a tiny run."""
    return check(compose_run(overrides_for(output_dir, *more)))


def run_tiny(output_dir: Path, *more: str) -> tuple[RunPlan, dict[str, Any]]:
    """Do a tiny run; its plan and result."""
    plan = plan_of(output_dir, *more)
    return plan, run(plan)


def perplexity_on(**files: Path) -> list[str]:
    """Overrides that evaluate perplexity on files only."""
    gone = [f"~evaluation.perplexity.texts.{name}" for name in ("web", "wiki", "code")]
    sizes = ["evaluation.perplexity.length=16", "evaluation.perplexity.num_windows=3"]
    texts = [f"+evaluation.perplexity.texts.{name}={path}" for name, path in files.items()]
    return ["evaluation=perplexity", *gone, *sizes, *texts]


def write_documents(path: Path, count: int = 40, words: int = 60, seed: int = 0) -> list[str]:
    """Write a JSONL text of `count` documents of random words, which no other seed repeats; returns them."""
    stream = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(count):
        letters = torch.randint(97, 123, (words, 6), generator=stream).tolist()
        documents.append(" ".join("".join(map(chr, word)) for word in letters))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return documents


def state_bytes(folder: Path) -> dict[str, bytes]:
    """Every tensor, weights and masks, of the windows a run has on disk, by file and name."""
    found = {}
    for path in sorted((folder / "state").glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (a safetensors file, not a dict)
                tensor = stream.get_tensor(name).contiguous()
                found[f"{path.name}/{name}"] = tensor.view(torch.uint8).numpy().tobytes()
    return found


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """What the only offline W&B run of a folder holds, read back from its file by W&B's own reader."""
    [record] = (folder / "wandb").glob("offline-run-*/*.wandb")
    told = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in told.stdout.splitlines()]


def timeless(value: Any) -> Any:
    """The same without seconds, measured or guessed, the one thing that two runs may differ in."""
    if isinstance(value, dict):
        return {
            key: timeless(item) for key, item in value.items() if key not in ("seconds", "guessed_seconds")
        }
    return [timeless(item) for item in value] if isinstance(value, list) else value


def copied_run(run: Path, number: int, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy of a finished run beside it, under another hash; `change(result, config)` edits both before they are written."""
    hash_ = f"{number:012x}"
    target = run.parent / f"{run.name.rpartition('-')[0]}-{hash_}"
    shutil.copytree(run, target)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    result |= {"id": target.name, "config_hash": hash_}
    change(result, config)
    (target / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (target / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return target


SWEEP_SETS = 4


def make_sweep(folder: Path) -> Path:
    """none and br_gp on four calibration sets: one run of each is real, the others copies whose numbers are scaled."""
    text = folder / "text.jsonl"
    write_documents(text)
    stream = np.random.default_rng(0)
    for start, technique in enumerate(("none", "br_gp")):
        epochs = "0" if technique == "none" else "3"
        choices = [
            f"reconstruction={technique}",
            f"reconstruction.epochs={epochs}",
            *perplexity_on(mine=text),
        ]
        plan, _ = run_tiny(folder / "runs", *choices)
        for number in range(1, SWEEP_SETS):

            def change(result: dict[str, Any], config: dict[str, Any], number: int = number) -> None:
                config["calibration"]["set"] = number
                factor = float(stream.uniform(0.5, 2))
                result["metrics"] = {name: value * factor for name, value in result["metrics"].items()}

            copied_run(plan.folder.path, 100 * start + number, change)
    return folder / "runs"
