"""What blocks and a run come to, in numbers: the flat metrics and the measured sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def reconstruction_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """`reconstruction/ROLE/NAME/{first,last,mean}` over blocks, and the same of `reconstruction_relative`."""
    metrics: dict[str, float] = {}
    if not rows:
        return metrics
    for role, texts in rows[0]["after"].items():
        for name in texts:
            for family, field in (("reconstruction", "error"), ("reconstruction_relative", "relative")):
                series = [float(row["after"][role][name][field]) for row in rows]
                base = f"{family}/{role}/{name}"
                metrics[f"{base}/first"] = series[0]
                metrics[f"{base}/last"] = series[-1]
                metrics[f"{base}/mean"] = sum(series) / len(series)
    return metrics


def measured_sparsity(rows: Sequence[Row], num_prunable: int) -> dict[str, Any]:
    """Share of the weights that the masks remove: of the targeted layers, by layer ('block.name'), of all `num_prunable`."""
    layers = {f"{row['block']}.{name}": layer for row in rows for name, layer in row["layers"].items()}
    weights = sum(layer["weights"] for layer in layers.values())
    removed = sum(layer["removed"] for layer in layers.values())
    return {
        "total": removed / weights if weights else 0.0,
        "of_all_prunable": removed / num_prunable,
        "layers": {name: layer["measured"] for name, layer in layers.items()},
    }


def block_metrics(row: Row) -> dict[str, float]:
    """A block's row as flat metrics for trackers: block/ROLE/NAME/{error,relative}_{before,after}."""
    metrics: dict[str, float] = {}
    for moment in ("before", "after"):
        for role, texts in row[moment].items():
            for name, errors in texts.items():
                for field, value in errors.items():
                    metrics[f"block/{role}/{name}/{field}_{moment}"] = value
    # Each training of a block has an objective of its own, so only one makes a curve: the last.
    losses = row["training"][-1]["epoch_losses"] if row["training"] else []
    if losses:
        metrics["block/loss_first_epoch"] = losses[0]
        metrics["block/loss_last_epoch"] = losses[-1]
    weights = sum(layer["weights"] for layer in row["layers"].values())
    if weights:
        metrics["block/sparsity"] = sum(layer["removed"] for layer in row["layers"].values()) / weights
    return metrics
