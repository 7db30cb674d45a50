"""What of a run's choices changes a number: what its hash is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from reprune.errors import ConfigError
from reprune.evaluation.suite import SuiteEntry
from reprune.pruning.contract import Needs
from reprune.reconstruction.least_squares import LeastSquares
from reprune.reconstruction.technique import Technique
from reprune.sparsity.schedule import Schedule
from reprune.transform.contract import Transform


def canonical(built: object) -> dict[str, Any]:
    """Class and fields of a choice, or what it says of itself where its fields do not tell."""
    assert is_dataclass(built)
    assert not isinstance(built, type)
    identity = getattr(built, "identity", None)
    return {"class": type(built).__qualname__, **(asdict(built) if identity is None else identity())}


def technique_identity(technique: Technique, needs: Needs, num_rounds: int) -> dict[str, Any]:
    """What of a technique changes a number: fields that nothing reads are left out, so that equal runs are one run."""
    fields = canonical(technique)
    if technique.layerwise is not None and not isinstance(technique.layerwise, LeastSquares):
        fields["layerwise"] = canonical(technique.layerwise)
    unread = {
        *(["rank", "lora_scale"] if technique.trainable != "masked_lora" else []),
        *(["patience"] if technique.stop_on is None else []),
        # Left out where they change nothing, so that runs from before there was a choice are the same runs.
        *(["training_dtype"] if technique.training_dtype == "float32" else []),
        *(["last_layer_iterations"] if technique.last_layer_iterations == 0 else []),
        *(["statistics_chain"] if not (needs.any or needs.block_gradients or needs.projected) else []),
    }
    if not technique.trains:
        read = {"statistics_chain", "within_block", "layerwise"}
        # Rounds go over all blocks that are new in a window.
        read |= {"window", "stride"} if num_rounds > 1 else set()
        read |= {"input_chain", "target_chain"} if technique.layerwise is not None else set()
        unread |= set(fields) - read
    return {name: value for name, value in fields.items() if name not in unread}


def transform_identity(transform: Transform, suite: Sequence[SuiteEntry]) -> dict[str, Any]:
    """The choice, and what of the evaluators it reads. ConfigError for an evaluator that it bars."""
    try:
        return {**canonical(transform), **transform.identity_beside(suite)}
    except ConfigError as error:
        raise error if error.key.startswith("transform") else error.under("transform") from None


def schedule_identity(schedule: Schedule, sparsity: float, reconstructs: bool) -> dict[str, Any]:
    """The sparsities of the rounds, and how they go together where there are several."""
    steps = list(schedule.steps(sparsity))
    if len(steps) == 1:
        return {"steps": steps}
    return {
        "steps": steps,
        "masks": schedule.masks,
        **({"reconstruct": schedule.reconstruct} if reconstructs else {}),
    }
