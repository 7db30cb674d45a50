"""What `dry_run=true` prints: the plan of a run, nothing loaded, nothing written."""

from __future__ import annotations

import re
from collections import Counter
from datetime import timedelta

from rich.table import Table

from reprune.arithmetic import guessed_seconds
from reprune.evaluation.suite import SuiteEntry
from reprune.identity import canonical
from reprune.memory import MemoryPlan
from reprune.reconstruction.technique import Technique
from reprune.run_plan import RunPlan
from reprune.tracking.progress import CONSOLE
from reprune.transform.contract import Untransformed


def show(plan: RunPlan) -> None:
    """Print layers, parameters, texts, expected memory and disk, and what would be written."""
    shapes, technique = plan.shapes, plan.technique
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{plan.source.name}, {shapes.num_parameters / 1e6:,.1f} M parameters")
    prunable = sum(shapes.num_weights.values())
    if not isinstance(plan.transform, Untransformed):
        facts = ", ".join(
            f"{key}={value}" for key, value in canonical(plan.transform).items() if key != "class"
        )
        table.add_row(
            "transformed", f"{type(plan.transform).__name__} ({facts}); what follows is of what is left"
        )
    table.add_row("blocks", f"{shapes.num_blocks}, hidden {shapes.hidden_size}")
    # A number within a block's names is an expert's, or another place in a list.
    kinds = Counter(
        (re.sub(r"\.\d+(?=\.|$)", ".*", name.split(".", 1)[1]), shape)
        for name, shape in shapes.linears.items()
        if name in shapes.target_layers
    )
    for (name, (d_out, d_in)), count in kinds.items():
        table.add_row("", f"{count} × {name} [{d_out} × {d_in}]")
    shares = dict.fromkeys(shapes.targets, plan.sparsity) if plan.rounds is None else plan.rounds[-1]
    removed = sum(shapes.num_weights[name] * share for name, share in shares.items())
    table.add_row(
        "pruned",
        f"{removed / 1e6:,.1f} M of {prunable / 1e6:,.1f} M prunable weights ({removed / prunable:.1%})",
    )
    choices = plan.composed.choices
    # A mask that is there, or none, is decided by nothing else.
    deciding = ("refine", "pattern", "allocation") if plan.pruner.needs.prunes else ()
    chosen = [choices.get(group) for group in ("pruner", *deciding)]
    table.add_row("", f"by {', '.join(option for option in chosen if option)}")
    if len(shapes.targets) < len(shapes.layers):
        table.add_row("", f"{len(shapes.targets)} of {len(shapes.layers)} layers; the others stay dense")
    if plan.rounds is None:
        table.add_row("", f"by layer as {type(plan.allocation).__name__} finds it in the dense model")
    if len(plan.steps) > 1:
        steps = ", ".join(f"{step:.1%}" for step in plan.steps)
        table.add_row("schedule", f"{len(plan.steps)} rounds: {steps}")
    table.add_row("reconstruction", _in_words(technique))
    for request in plan.requests:
        source = request.source
        size = f"{source.num_sequences or 'all'} × {source.length or 'as they are'} tokens"
        table.add_row(request.use, f"{request.name}: {size}")
    for entry in plan.suite:
        for name, text in entry.texts.items():
            table.add_row("evaluation", f"{entry.name} on {name}: {tuple(text.tokens_NT.shape)} tokens")
        for task, count in _asked(entry).items():
            table.add_row("evaluation", f"{entry.name}, {task}: {count} examples")
    table.add_row("device", f"{plan.device.name}, {str(plan.device.dtype).removeprefix('torch.')}")
    time = f"about {timedelta(seconds=round(guessed_seconds(plan)))} (h:mm:ss), by arithmetic alone"
    table.add_row("time", f"{time}{', without tasks' if any(map(_asked, plan.suite)) else ''}")
    table.add_row("memory", _memory_in_words(plan.memory))
    table.add_row("disk", f"about {plan.memory.disk / 2**30:.2f} GiB")
    table.add_row("writes", str(plan.folder.path))
    table.add_row("state", plan.folder.status().words)
    CONSOLE.print(table, highlight=False)


def _asked(entry: SuiteEntry) -> dict[str, int]:
    """Examples by task, of an evaluator that asks for answers."""
    found: dict[str, int] = getattr(entry.evaluator, "asked", {})
    return found


def _memory_in_words(memory: MemoryPlan) -> str:
    limit = "" if memory.host_limit is None else f" of {memory.host_limit / 2**30:.2f}"
    places = {
        "memory": "weights in memory",
        "disk": "weights of blocks on disk until their turn",
    }
    stored = "memory" if memory.activations == "memory" else "files"
    return f"about {memory.host / 2**30:.2f}{limit} GiB: {places[memory.weights]}, activations in {stored}"


def _in_words(technique: Technique) -> str:
    layerwise = technique.layerwise
    parts = [] if layerwise is None else [f"{layerwise.name.replace('_', ' ')} of every layer"]
    if technique.trains:
        blocks = (
            f"window {technique.window}, stride {technique.stride}" if technique.window else "the whole model"
        )
        what = "attention and MLP by themselves" if technique.granularity == "submodule" else blocks
        parts.append(
            f"{what}: {technique.trainable}, {technique.loss}, {technique.epochs} epochs, lr {technique.learning_rate:g}"
            f"{', products in bfloat16' if technique.training_dtype == 'bfloat16' else ''}"
        )
        if technique.last_layer_iterations:
            parts.append(f"{technique.last_layer_iterations} iterations of least squares of its last layer")
    return ", then ".join(parts) or "none"
