"""Peak memory of runs on a model of Llama-7B's shapes with random bfloat16 weights, 13 GB on disk; no network, no GPU.

    .venv/bin/python -m pytest benchmarks/bench_memory.py --folder DIR --windows 4 --csv experiments/results/memory_cpu.csv

The checkpoint is written into DIR once (seconds a block), then each arm is a process of its own: the whole model, or the
first blocks of it, through the real run under `memory.host_limit`, with weights on disk until their turn. Told are
the peak of resident memory that the kernel counted for the process (mapped files included), the plan's estimate, and
the time; of arms that end after some blocks also what the whole model would take at the same rate. The floor of a
block's time is the run's own arithmetic at the rate of bare products. The numbers that a random model gives mean nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from floors import floors_of
from safetensors import safe_open
from timing import Measure, Rows

from reprune.engine.state import OPEN
from reprune.engine.windows import windows_over
from reprune.files import read_json
from reprune.model.tiny import TinyModel
from reprune.operations import Visits
from reprune.seeding import generator
from reprune.tensor_files import write_tensors

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, BLOCKS = 4096, 11008, 32, 32000, 32
COMMON = ["evaluation=none", "tracking=jsonl", "seed=0", "calibration@reconstruction_data=same"]
ARMS: dict[str, tuple[int | None, str, list[str]]] = {
    "wanda, all blocks": (None, "6GiB", ["pruner=wanda", "reconstruction=none"]),
    "sparsegpt + br_gp, 4 blocks": (4, "6GiB", ["pruner=sparsegpt", "reconstruction=br_gp"]),
    "sparsegpt + br_gp_cr, 4 blocks": (4, "9GiB", ["pruner=sparsegpt", "reconstruction=br_gp_cr"]),
}

SETTINGS = ("windows", "length")
ONE_ROUND = True
CHILDREN = True


class _EnoughError(Exception):
    """Enough windows were measured."""


def arms(config: pytest.Config) -> list[str]:
    """Runs."""
    return list(ARMS)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Where the checkpoint is."""
    found: Path | None = request.config.getoption("folder")
    if found is None:
        pytest.exit(
            "--folder=DIR is needed: checkpoint and runs take 30 GB", returncode=pytest.ExitCode.USAGE_ERROR
        )
    write_checkpoint(found / "llama_7b")
    return found.resolve()


def test_run(
    arm: str, folder: Path, measure: Measure, rows: Rows, kept: Rows, request: pytest.FixtureRequest
) -> None:
    """One run in a process of its own, whose peak no other run has raised."""
    numbers = [request.config.getoption(name) for name in ("windows", "length", "threads")]
    command = [sys.executable, __file__, arm, str(folder), *map(str, numbers)]
    done = measure(lambda: subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True))
    rows.append(json.loads(done.stdout.splitlines()[-1]))
    kept.append(rows[-1])


def test_table(rows: Rows, printed: Rows) -> None:
    """All of them."""
    printed += rows


def write_checkpoint(folder: Path) -> None:
    """A folder that transformers loads: config, a byte tokenizer, a file for each block and one for the rest."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    for path in TinyModel().description().iterdir():
        if "token" in path.name:
            shutil.copy(path, folder)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=BLOCKS,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    where: dict[str, str] = {}
    for part in range(BLOCKS + 1):
        name = f"model-{part + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
        tensors = _outside() if part == BLOCKS else _block(part)
        write_tensors(folder / name, tensors, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _block(number: int) -> dict[str, torch.Tensor]:
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "o")}
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INTERMEDIATE, HIDDEN))
    shapes["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    below = f"model.layers.{number}"
    tensors = {f"{below}.{name}.weight": _random(name, number, *shape) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {f"{below}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}


def _outside() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": _random("embedding", 0, VOCABULARY, HIDDEN),
        "lm_head.weight": _random("head", 0, VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }


def _random(name: str, number: int, rows: int, columns: int) -> torch.Tensor:
    stream = generator(0, "benchmark", name, number)
    return (torch.randn(rows, columns, generator=stream) / columns**0.5).to(torch.bfloat16)


def run_arm(arm: str, folder: Path, windows: int, length: int, threads: int) -> dict[str, Any]:
    """One run in this process: what it took, beside what was planned and what cannot be spared."""
    from reprune.check import check
    from reprune.compose import compose_run
    from reprune.pipeline import run

    num_blocks, limit, overrides = ARMS[arm]
    out = folder / "runs"
    shutil.rmtree(out, ignore_errors=True)
    if "reconstruction=none" not in overrides:
        overrides = [*overrides, "reconstruction.epochs=1"]
    plan = check(
        compose_run(
            [
                "model=local",
                f"model.path={folder / 'llama_7b'}",
                *COMMON,
                *overrides,
                "dtype=bfloat16",
                "device=cpu",
                f"threads={threads}",
                "sparsity=0.5",
                "memory.weights=disk",
                f"memory.host_limit={limit}",
                f"calibration.num_sequences={windows}",
                f"calibration.length={length}",
                *(f"~calibration@probes.{name}" for name in ("held_out", "wiki", "code")),
                f"output_dir={out}",
            ]
        )
    )

    ended: list[float] = []

    def count(windows: int) -> None:
        ended.append(time.time())
        if windows == num_blocks:
            raise _EnoughError

    begun = time.perf_counter()
    with contextlib.suppress(_EnoughError):
        run(plan, count)
    seconds = time.perf_counter() - begun
    done = num_blocks or BLOCKS
    blocks_begun = read_json(plan.folder.path / "status.json")["blocks_begun_s"]
    in_blocks = ended[-1] - blocks_begun
    written = sum(path.stat().st_size for path in plan.folder.path.rglob("*") if path.is_file())
    # The run resets the kernel's count at the start of each stage. (getrusage would tell of the parent's memory too.)
    with safe_open(plan.folder.state / OPEN, framework="pt") as stream:
        measured = json.loads(stream.metadata()["measured"])["peak_bytes"]
    peak = max(measured.values())
    shutil.rmtree(out)
    floors = floors_of(plan)
    training = floors.pop("reconstruction")
    if plan.technique.trains:
        windows = windows_over(BLOCKS, plan.technique.window, plan.technique.stride)[:done]
        training *= sum(window.stop - window.first for window in windows) / Visits.of(plan).trained
    floor = training + sum(floors.values()) * done / BLOCKS
    return {
        "arm": arm,
        "limit_gib": float(limit.removesuffix("GiB")),
        "peak_gib": peak / 2**30,
        "planned_gib": plan.memory.host / 2**30,
        "blocks": done,
        "seconds": seconds,
        "seconds_a_block": in_blocks / done,
        "share": floor / in_blocks,
        "whole_model_hours": (seconds + in_blocks * (BLOCKS - done) / done) / 3600,
        "written_gb": written / 1e9,
    }


if __name__ == "__main__":
    arm, folder, *numbers = sys.argv[1:]
    print(json.dumps(run_arm(arm, Path(folder), *map(int, numbers))))
