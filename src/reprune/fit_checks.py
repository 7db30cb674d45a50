"""What a reconstruction technique cannot do with a model or a run's texts, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reprune.calibration.gather import Request
from reprune.errors import ConfigError
from reprune.evaluation.suite import SuiteEntry
from reprune.model.biases import told_of
from reprune.model.checkpoint import ModelSource
from reprune.model.description import skeleton
from reprune.reconstruction.technique import LANGUAGE, Technique
from reprune.shapes import Shapes
from reprune.sparsity.patterns import Pattern
from reprune.transform.contract import Transform, Untransformed


def check_experts(technique: Technique, shapes: Shapes, num_rounds: int) -> None:
    """ConfigError for least squares between two chains that send a token to different experts."""
    if technique.layerwise is None or technique.target_chain == "sparse":
        return
    if technique.solves_on_dense_inputs(num_rounds - 1):
        return
    experts = [name for name, layer in shapes.target_layers.items() if layer.expert]
    if experts:
        raise ConfigError(
            "reconstruction.target_chain",
            f"{experts[0]} is an expert: the dense and the pruned chain send it different tokens, so that least squares "
            "has no pairs to go by",
            value=technique.target_chain,
            accepted="sparse, for least squares of experts",
            hint="reconstruction.target_chain=sparse, or targets=attention",
        )


def needs_whole_model(
    technique: Technique,
    transform: Transform,
    requests: Sequence[Request],
    suite: Sequence[SuiteEntry],
    tied: str | None,
    *,
    compact: bool,
) -> str | None:
    """What of a run cannot do with weights that are read block by block, in words; None where all can.

    `tied` are two places of one tensor, in different blocks or in one and outside.
    """
    writing = next((request.key for request in requests if request.source.needs_model), None)
    written = next((entry.name for entry in suite if getattr(entry.evaluator, "writes", False)), None)
    reasons = {
        f"a model in which {tied} are one tensor": tied is not None,
        f"reconstruction.loss={LANGUAGE}": technique.trains and technique.loss == LANGUAGE,
        "a transform of the model": not isinstance(transform, Untransformed),
        "export.compact=true": compact,
        # It would read the whole model once a token.
        f"{writing}, which the model writes,": writing is not None,
        f"evaluation.{written}, for which the model writes,": written is not None,
    }
    return next((words for words, holds in reasons.items() if holds), None)


def check_stop_on(technique: Technique, requests: Sequence[Request]) -> None:
    """ConfigError unless `stop_on` names a validation text: what a choice is made on can be no probe."""
    if technique.stop_on is None:
        return
    if not technique.trains:
        raise ConfigError(
            "reconstruction.stop_on",
            "nothing is trained that could be stopped",
            value=technique.stop_on,
            accepted="null with this technique",
        )
    names = [request.name for request in requests if request.use == "validation"]
    if technique.stop_on in names:
        return
    elsewhere = [request.use for request in requests if request.name == technique.stop_on]
    free = "stop" if elsewhere else technique.stop_on
    known = f"this is a text for {elsewhere[0]}" if elsewhere else "no validation text has this name"
    raise ConfigError(
        "reconstruction.stop_on",
        f"{known}; text that a choice is made on must be validation text",
        value=technique.stop_on,
        accepted=names or "the name of a validation text; there is none yet",
        hint=f"+calibration@validation.{free}=web reconstruction.stop_on={free}",
    )


def check_last_layer(technique: Technique, tied: str | None, requests: Sequence[Request]) -> None:
    """ConfigError for a last layer that another block of its window has too, and for text of a single sequence."""
    if not technique.last_layer_iterations:
        return
    key = "reconstruction.last_layer_iterations"
    if tied is not None and technique.window != 1:
        raise ConfigError(
            key, f"{tied} are one tensor, so that a window's error is not quadratic in its last layer",
            value=technique.last_layer_iterations, accepted="0 with this model, or reconstruction.window=1",
        )  # fmt: skip
    counts = [it.source.num_sequences for it in requests if it.use == "reconstruction"]
    if sum(count or 2 for count in counts) < 2:
        raise ConfigError(
            key, "the one half of the sequences has to confirm what the other gives", value="1 sequence",
            accepted="2 sequences of reconstruction text, or more", hint="calibration.num_sequences=8, or 0 iterations",
        )  # fmt: skip


def check_new_biases(
    technique: Technique,
    shapes: Shapes,
    source: ModelSource,
    pattern: Pattern,
    num_rounds: int,
    exports: Mapping[str, bool],
) -> None:
    """ConfigError for biases that experts cannot have, for several rounds of units, and for exports that cannot tell of them."""
    if not technique.writes_biases:
        return
    experts = [name for name, layer in shapes.target_layers.items() if layer.expert]
    if experts:
        raise ConfigError(
            "reconstruction", f"{experts[0]} is an expert, which gets no bias of its own",
            value=technique.layerwise.__class__.__name__, accepted="targets without experts", hint="targets=attention",
        )  # fmt: skip
    if pattern.units and num_rounds > 1:
        raise ConfigError(
            "schedule", "what units gave in the mean is known in the round in which they go, and a later round would "
            "forget it", value=f"{num_rounds} rounds", accepted="one_shot with units and this reconstruction",
        )  # fmt: skip
    keys = [layer.key for layer in shapes.target_layers.values()]
    assert all(key is not None for key in keys)
    paths = {f"{key.removesuffix('.weight')}.bias" for key in keys if key is not None}
    asked = next((name for name in ("model", "compact") if exports[name]), None)
    if asked is not None and not told_of(skeleton(source)[0], paths):
        raise ConfigError(
            f"export.{asked}",
            "its layers get biases that they had not, of which its config cannot tell plain transformers",
            value=True,
            accepted=f"false for {source.name} with this reconstruction",
        )
