"""Everything that can be checked before a weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reprune import RESULTS_VERSION
from reprune.build import build
from reprune.calibration.gather import cut_all, requests_of
from reprune.calibration.windows import resolve_bos
from reprune.compose import Composed
from reprune.config_files import check_published
from reprune.engine.spread import spreads
from reprune.engine.windows import windows_over
from reprune.errors import ConfigError, require_nonnegative
from reprune.evaluation.suite import SuiteEntry, check_suite, described_tokenizer
from reprune.fit_checks import (
    check_experts,
    check_last_layer,
    check_new_biases,
    check_stop_on,
    needs_whole_model,
)
from reprune.identity import canonical, schedule_identity, technique_identity, transform_identity
from reprune.memory import check_words, plan_memory
from reprune.model.checkpoint import ModelSource
from reprune.model.description import dtype_of, load_tokenizer
from reprune.model.device import plan_device
from reprune.pruning.contract import Pruner
from reprune.pruning.refinement import Refinement, Unrefined, needs_of, reads_apart
from reprune.ranks import ALONE, Ranks
from reprune.reconstruction.technique import Technique
from reprune.rounds import (
    allocated,
    check_compact,
    check_gradient_text,
    check_masks_fit,
    check_nothing_else_decides,
    check_order,
    check_refinement,
    check_units,
)
from reprune.run_folder import RunFolder, config_hash
from reprune.run_plan import RunPlan
from reprune.shapes import check_room, existing, shapes_of, sizes_of
from reprune.sparsity.allocation import ModelAllocation, SizeAllocation
from reprune.sparsity.patterns import Pattern, Unstructured
from reprune.tracking.contract import Tracking
from reprune.transform.contract import Transform, Untransformed


def check(composed: Composed, *, here: bool = True, ranks: Ranks = ALONE) -> RunPlan:
    """Build and check one run, which `ranks` will do. Raises ConfigError for whatever is wrong, cheap checks first.

    Where it is not done `here`, nothing is asked of this machine's devices and memory.
    """
    config, where = composed.config, composed.where
    technique: Technique = build(config["reconstruction"], "reconstruction", where)
    pattern: Pattern = build(config["pattern"], "pattern", where)
    pruner: Pruner = build(config["pruner"], "pruner", where)
    refine = None if config["refine"] is None else build(config["refine"], "refine", where)
    refinement: Refinement | None = None if isinstance(refine, Unrefined) else refine
    transform: Transform = (
        Untransformed() if config["transform"] is None else build(config["transform"], "transform", where)
    )
    allocation: SizeAllocation | ModelAllocation = build(config["allocation"], "allocation", where)
    schedule = build(config["schedule"], "schedule", where)
    tracking: Tracking = build(config["tracking"], "tracking", where)
    source: ModelSource = build(config["model"], "model", where)
    mask_data = build(config["calibration"], "calibration", where)
    reconstruction_data = build(config["reconstruction_data"], "reconstruction_data", where)
    validation = _built(config, "validation", where)
    probes = _built(config, "probes", where)
    evaluators = _built(config, "evaluation", where)
    # A pruner that removes nothing fits every pattern, but not a sparsity that makes no sense.
    asked = (
        pattern.resolve(config["sparsity"])
        if pruner.needs.prunes
        else Unstructured().resolve(config["sparsity"])
    )
    sparsity = asked if pruner.needs.prunes else 0.0
    require_nonnegative(
        seed=config["seed"], seed_data=config["seed_data"], seed_training=config["seed_training"]
    )
    check_published(config["published"])
    if not 0 <= config["max_overlap"] <= 1:
        raise ConfigError(
            "max_overlap", "is a share of the calibration windows", value=config["max_overlap"],
            accepted="0 (none, the default) to 1",
        )  # fmt: skip
    check_words(config["memory"])
    _check_writable(Path(config["output_dir"]))
    device = plan_device(
        config["device"], config["dtype"], dtype_of(source), config["threads"], here=here, ranks=ranks
    )
    tokenizer = load_tokenizer(source)
    shapes = shapes_of(source, config["targets"], config["target_blocks"], transform)
    windows_over(shapes.num_blocks, technique.window, technique.stride)
    check_experts(technique, shapes, len(schedule.steps(sparsity)))
    check_new_biases(technique, shapes, source, pattern, len(schedule.steps(sparsity)), config["export"])
    if pruner.needs.prunes:
        pruner.check(pattern)
        for name, layer in shapes.target_layers.items():
            pattern.check_shape(name, layer.shape)
    rounds: list[dict[str, float]] | None
    brought = pruner.brings(shapes.target_layers, pattern, known=shapes.layers)
    if brought is not None:
        check_nothing_else_decides(config["sparsity"], allocation, schedule)
        check_masks_fit(transform)
        sparsity = _total(brought, shapes.num_weights)
        steps, rounds = [sparsity], [dict(brought)]
    else:
        steps = list(schedule.steps(sparsity)) if pruner.needs.prunes else [sparsity]
        # Masks that are chosen anew need not remove more in every round.
        if len(steps) > 1 and schedule.masks == "monotone":
            pattern.check_steps(steps)
        rounds = allocated(allocation, shapes.to_allocate, pruner, pattern, steps, list(validation))
    check_refinement(refinement, pruner)
    check_order(pattern, pruner, refinement, steps)
    check_units(pattern, pruner, refinement, technique, schedule, list(shapes.target_layers.values()))
    if config["export"]["compact"]:
        check_compact(pattern, allocation, shapes.targets, shapes.num_blocks, brought=brought is not None)
    needs = needs_of(pruner, refinement)
    requests = requests_of(mask_data, reconstruction_data, validation, probes)
    check_gradient_text(needs, requests)
    for request in requests:
        request.source.check(request.key)
        resolve_bos(request.source.bos, tokenizer, request.key)
        request.source.check_tokenizer(tokenizer, request.key)
        request.source.check_room(shapes.max_length, tokenizer, request.key)
    check_stop_on(technique, requests)
    check_last_layer(technique, shapes.tied, requests)
    suite = [
        SuiteEntry(name, evaluator, evaluator.cut(tokenizer, f"evaluation.{name}"))
        for name, evaluator in evaluators.items()
    ]
    seed_data = config["seed"] if config["seed_data"] is None else config["seed_data"]
    seed_training = config["seed"] if config["seed_training"] is None else config["seed_training"]
    identity = {
        "results_version": RESULTS_VERSION,
        "model": source.identity(),
        "blocks_path": source.blocks_path,
        "tokenizer": described_tokenizer(tokenizer),
        "texts": [
            {**request.identity, "bos": resolve_bos(request.source.bos, tokenizer, request.key)}
            for request in requests
        ],
        "pruner": canonical(pruner),
        "pattern": canonical(pattern),
        "allocation": canonical(allocation),
        "schedule": schedule_identity(
            schedule, sparsity, technique.trains or technique.layerwise is not None
        ),
        "technique": technique_identity(technique, needs, len(steps)),
        **(
            {}
            if isinstance(transform, Untransformed)
            else {"transform": transform_identity(transform, suite)}
        ),
        **({} if refinement is None else {"refinement": canonical(refinement)}),
        "targets": shapes.targets if len(shapes.targets) < len(shapes.layers) else "all",
        "sparsity": sparsity,
        "seeds": [seed_data, seed_training],
        "dtype": str(device.dtype),
        "device": device.kind,
    }
    folder = RunFolder.of(Path(config["output_dir"]), _label(composed, source), config_hash(identity))
    lengths = {f"{request.key}.length": request.source.length for request in requests}
    for key, length in lengths.items():
        if length is not None and shapes.max_length is not None and length > shapes.max_length:
            raise ConfigError(
                key, "longer than the model's context", value=length, accepted=f"at most {shapes.max_length}"
            )
    check_suite(suite, shapes.max_length)
    texts, waiting = cut_all(requests, tokenizer, None, seed_data)
    exports = {f"exports_{kind}": config["export"][kind] for kind in ("model", "compact")}
    second_gram = refinement is not None and refinement.needs.gram and reads_apart(pruner, refinement)
    at_once = ranks.count if spreads(technique, len(steps), shapes.tied, ranks) else 1
    sizes = sizes_of(
        texts,
        waiting,
        shapes,
        technique,
        device,
        needs,
        second_gram,
        len(steps),
        **exports,
        windows_at_once=at_once,
    )
    if transform.keeps_rows:
        outside = shapes.num_parameters - shapes.num_block_parameters
        sizes = replace(sizes, disk=sizes.disk + outside * torch.finfo(device.dtype).bits // 8)
    whole = needs_whole_model(
        technique, transform, requests, suite, shapes.tied, compact=config["export"]["compact"]
    )
    sizes = sizes.of_processes(ranks.count)
    if config["export"]["masks"]:
        sizes = sizes.with_masks_of(shapes.num_prunable)
    memory = plan_memory(config["memory"], sizes, whole, device.kind, shared=ranks.several)
    device = device.below(memory.device_limit)
    plan = RunPlan(
        composed, source, tokenizer, device, shapes, transform, pruner, pattern, sparsity, steps, rounds, allocation, refinement,
        schedule, technique, requests,
        suite, tracking, folder, identity, seed_data, seed_training, memory,
    )  # fmt: skip
    if here and ranks.first and not folder.finished:
        check_room(memory.host, memory.disk, Path(config["output_dir"]), source.name)
    plan.check_texts(texts)
    return plan


def _built(config: Mapping[str, Any], group: str, where: Mapping[str, str]) -> dict[str, Any]:
    nodes = config[group] or {}
    return {name: build(node, f"{group}.{name}", where) for name, node in nodes.items() if node is not None}


def _total(layer_sparsity: Mapping[str, float], num_weights: Mapping[str, int]) -> float:
    removed = sum(share * num_weights[name] for name, share in layer_sparsity.items())
    return removed / sum(num_weights[name] for name in layer_sparsity)


def _label(composed: Composed, source: ModelSource) -> str:
    choices = composed.choices
    technique = choices.get("arm") or choices.get("reconstruction", "reconstruction")
    return "-".join([source.name, choices.get("pruner", "pruner"), technique])


def _check_writable(output_dir: Path) -> None:
    place = existing(output_dir)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            "output_dir", f"cannot be written: {place}", value=output_dir, accepted="a writable folder"
        )
