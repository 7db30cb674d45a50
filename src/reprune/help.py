"""The help screen: every group, searchpath groups included, with one line an option."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from reprune.config_files import option_files
from reprune.files import fill
from reprune.tracking.progress import CONSOLE

GROUPS = {
    "model": "the language model",
    "calibration": "text for the masks; also calibration@reconstruction_data=, calibration@probes.NAME=",
    "transform": "what is made of the model before it is pruned",
    "pruner": "which weights go",
    "refine": "swaps that better any pruner's mask",
    "pattern": "in what grid they go",
    "allocation": "how the sparsity is spread over layers",
    "schedule": "in how many steps",
    "reconstruction": "how the dense output is restored; 'none' leaves what the pruner left",
    "evaluation": "what is measured on the pruned model",
    "method": "several of these choices at once, as a paper has them",
    "tracking": "where metrics go beside the run folder",
    "experiments": "one scientific question each",
    "arm": "points of an experiment, differences only",
    "sweeps": "grids",
    "launcher": "where the runs of a sweep are done",
}
METHODS = ("method", "transform", "pruner", "refine", "pattern", "allocation", "schedule", "reconstruction")
"""The groups whose options are methods: each has a line and a cost."""
COST = "cost:"
TOP_LEVEL = {
    "sparsity": "share of weights removed; null: the pattern's own, 0.5 for unstructured",
    "targets": "which layers are pruned: all, attention, mlp, or names with wildcards",
    "target_blocks": "in which blocks: all, first:N, last:N, A:B",
    "seed, seed_data, seed_training": "the run's seed; data and training can be set apart",
    "device, dtype, threads": "auto, or cpu, cuda, cuda:N, mps; float32, bfloat16, float16; a number",
    "memory.host_limit, memory.device_limit": "what a run has to stay below, e.g. 6GiB; what does not fit rests on disk",
    "memory.weights, memory.activations": "where they rest: auto, memory, disk",
    "output_dir": "where run folders lie (outputs)",
    "export.model, export.masks, export.compact": "true writes the pruned model, the masks, a smaller model without the units that pattern=structured removed",
    "experiment": "the W&B group",
    "max_overlap, allow_overlap": "share of calibration windows that may repeat held-out text (0); true: any",
    "published": "a table of experiments/published, for the report to show beside our numbers",
    "dry_run": "true checks everything and prints the plan",
    "profile": "true prints where the time went, and writes a trace of one window (trace.json)",
    "sweep.confirm, sweep.max_runs, sweep.max_hours": "a sweep of more than that many runs (200) or hours needs sweep.confirm=true",
    "sweep.skip": "points of a grid that make no sense: a list of mappings of choices and keys to values",
    "sweep.own_process": "false does the runs of a sweep in the launcher's process (true: each in its own, tried again if killed)",
    "sweep.jobs": "how many runs launcher=box does at a time on a machine without GPUs (2)",
}
EXAMPLES = (
    ("the default run: SmolLM2-135M, C4, SparseGPT 50 %, BR+GP", "reprune"),
    ("Wanda 2:4, cross-block reconstruction, more text", "reprune pruner=wanda pattern=2to4 reconstruction=br_gp_cr calibration.num_sequences=64"),
    ("the five arms of the quickstart", "reprune experiments=quickstart"),
)  # fmt: skip


@dataclass(frozen=True)
class Option:
    """What the head of an option's YAML says: its first comment, and after `# cost:` what it takes beside the run itself."""

    line: str
    cost: str | None


def options(group: str) -> dict[str, Option]:
    """The options of a group by name."""
    return {name: _option(path) for name, path in option_files(group).items()}


def _option(path: Path) -> Option:
    lines = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    words = [line.strip() for line in lines if not line.startswith("@")]
    costs = [line.removeprefix(COST).strip() for line in words if line.startswith(COST)]
    return Option(next((line for line in words if not line.startswith(COST)), ""), next(iter(costs), None))


def methods_table() -> str:
    """The options of METHODS as a Markdown table: group, option, what it is, cost."""
    rows = [
        f"| `{group}` | `{name}` | {_cell(option.line)} | {option.cost or ''} |"
        for group in METHODS
        for name, option in options(group).items()
    ]
    return "\n".join(
        ["| group | option | what it is | cost beside the run's |", "|---|---|---|---|", *rows, ""]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def show() -> None:
    """Print the help screen."""
    CONSOLE.print("reprune: reconstruction-aware pruning of language models\n", highlight=False)
    CONSOLE.print("usage: reprune [-m] [GROUP=OPTION] [KEY=VALUE] …\n", markup=False, highlight=False)
    table = Table.grid(padding=(0, 2))
    for group, meaning in GROUPS.items():
        there = options(group)
        if not there:
            continue
        table.add_row(f"[bold]{group}[/bold]", f"[dim]{meaning}[/dim]")
        for name, option in there.items():
            table.add_row(
                f"  {name}", Text.assemble(option.line, (f" · {option.cost}" if option.cost else "", "dim"))
            )
    table.add_row("", "")
    for key, line in TOP_LEVEL.items():
        table.add_row(f"[bold]{key}[/bold]", line)
    CONSOLE.print(table)
    CONSOLE.print("\nexamples", highlight=False)
    for meaning, command in EXAMPLES:
        CONSOLE.print(f"  # {meaning}\n  {command}", highlight=False, markup=False)
    CONSOLE.print("\n-m runs every point of a sweep; --cfg job prints the composed config.", highlight=False)


if __name__ == "__main__":
    # `make options`: the README's table of methods.
    fill(Path(sys.argv[1]), "make options", methods_table())
