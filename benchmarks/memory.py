"""Peak memory of runs on a model of Llama-7B's shapes with random bfloat16 weights, 13 GB on disk; no network, no GPU.

    python benchmarks/memory.py --folder DIR --csv experiments/results/memory_cpu.csv

The checkpoint is written into DIR once (seconds a block), then each arm is a process of its own: the whole model, or the
first blocks of it, through the real run under `memory.host_limit`, with weights on disk until their turn. Printed are
the peak of resident memory that the kernel counted for the process (mapped files included), the plan's estimate, and
the time; of arms that end after some blocks also what the whole model would take at the same rate. The numbers that a
random model gives mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from reprune.engine.state import OPEN
from reprune.files import read_json
from reprune.model.tiny import TinyModel
from reprune.seeding import generator
from reprune.tensor_files import write_tensors

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, BLOCKS = 4096, 11008, 32, 32000, 32
COMMON = ["evaluation=none", "tracking=jsonl", "seed=0", "calibration@reconstruction_data=same"]
ARMS: dict[str, tuple[int | None, str, list[str]]] = {
    "wanda, all blocks": (None, "6GiB", ["pruner=wanda", "reconstruction=none"]),
    "sparsegpt + br_gp, 4 blocks": (4, "6GiB", ["pruner=sparsegpt", "reconstruction=br_gp"]),
    "sparsegpt + br_gp_cr, 4 blocks": (4, "9GiB", ["pruner=sparsegpt", "reconstruction=br_gp_cr"]),
}


class _EnoughError(Exception):
    """Enough windows were measured."""


def main() -> None:
    """Write the checkpoint, run the arms, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoint and runs go: 30 GB")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm is not None:
        print(json.dumps(run_arm(given)))
        return
    write_checkpoint(given.folder / "llama_7b")
    rows = []
    for arm in given.arms:
        command = [sys.executable, __file__, "--folder", str(given.folder), "--arm", arm]
        command += [f"--{name}={getattr(given, name)}" for name in ("sequences", "length", "threads")]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        rows.append(json.loads(told.splitlines()[-1]))
        frame = pd.DataFrame(rows).assign(machine=machine(given.threads))
        if given.csv is not None:
            # After each, since an arm takes many minutes.
            frame.to_csv(given.csv, index=False)
    show(frame, given)


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


def run_arm(given: argparse.Namespace) -> dict[str, Any]:
    """One run in this process: what it took, beside what was planned."""
    from reprune.check import check
    from reprune.compose import compose_run
    from reprune.pipeline import run

    num_blocks, limit, overrides = ARMS[given.arm]
    out = given.folder / "runs"
    shutil.rmtree(out, ignore_errors=True)
    if "reconstruction=none" not in overrides:
        overrides = [*overrides, "reconstruction.epochs=1"]
    plan = check(
        compose_run(
            [
                "model=local",
                f"model.path={given.folder / 'llama_7b'}",
                *COMMON,
                *overrides,
                "dtype=bfloat16",
                "device=cpu",
                f"threads={given.threads}",
                "sparsity=0.5",
                "memory.weights=disk",
                f"memory.host_limit={limit}",
                f"calibration.num_sequences={given.sequences}",
                f"calibration.length={given.length}",
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
    return {
        "arm": given.arm,
        "limit_gib": float(limit.removesuffix("GiB")),
        "peak_gib": peak / 2**30,
        "planned_gib": plan.memory.host / 2**30,
        "tokens": given.sequences * given.length,
        "blocks": done,
        "seconds": seconds,
        "seconds_a_block": in_blocks / done,
        "whole_model_seconds": seconds + in_blocks * (BLOCKS - done) / done,
        "written_gb": written / 1e9,
        "command": "python benchmarks/memory.py --folder DIR",
    }


def show(frame: pd.DataFrame, given: argparse.Namespace) -> None:
    """The table in words."""
    console = Console(width=150 if not sys.stdout.isatty() else None, highlight=False)
    console.print(machine(given.threads))
    console.print(f"Llama-7B's shapes, bfloat16, {given.sequences} × {given.length} tokens, one epoch")
    table = Table(box=None, pad_edge=False)
    for name in ("arm", "limit GiB", "peak GiB", "planned GiB", "s a block", "whole model, h", "written GB"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in frame.itertuples():
        table.add_row(
            row.arm, f"{row.limit_gib:g}", f"{row.peak_gib:.2f}", f"{row.planned_gib:.2f}",
            f"{row.seconds_a_block:.1f}", f"{row.whole_model_seconds / 3600:.2f}", f"{row.written_gb:.1f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
