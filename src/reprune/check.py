"""Everything that can be checked before a weight is loaded, and the plan that comes out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from reprune import RESULTS_VERSION
from reprune.build import build
from reprune.calibration.corpora import CorpusSource
from reprune.calibration.gather import Request, cut_all, requests_of
from reprune.calibration.overlap import run_length
from reprune.calibration.roles import Texts, check_roles
from reprune.calibration.splits import common_runs, tokenizer_identity
from reprune.calibration.windows import resolve_bos
from reprune.compose import Composed
from reprune.engine.windows import windows_over
from reprune.errors import ConfigError, require_nonnegative
from reprune.evaluation.suite import SuiteEntry
from reprune.model.checkpoint import ModelSource
from reprune.model.device import DevicePlan, plan_device
from reprune.model.linears import linears_of
from reprune.model.loading import load_config, load_tokenizer, skeleton
from reprune.pruning.contract import Pruner
from reprune.reconstruction.gradient import check_lengths
from reprune.reconstruction.technique import Technique
from reprune.run_folder import RunFolder, config_hash
from reprune.sparsity.patterns import Pattern, Unstructured
from reprune.tracking.contract import Tracking


@dataclass(frozen=True)
class Shapes:
    """What the plan knows of a model without its weights."""

    num_blocks: int
    hidden_size: int
    num_parameters: int
    num_block_parameters: int
    linears: dict[str, tuple[int, int]]
    max_length: int | None

    @property
    def num_weights(self) -> dict[str, int]:
        """Weights by layer."""
        return {name: rows * columns for name, (rows, columns) in self.linears.items()}


@dataclass(frozen=True)
class RunPlan:
    """A run that was checked: every object built, every text cut that needs no model, sizes known."""

    composed: Composed
    source: ModelSource
    tokenizer: Any
    device: DevicePlan
    shapes: Shapes
    pruner: Pruner
    pattern: Pattern
    sparsity: float
    layer_sparsity: dict[str, float]
    technique: Technique
    requests: list[Request]
    suite: list[SuiteEntry]
    tracking: Tracking
    folder: RunFolder
    identity: dict[str, Any]
    seed_data: int
    seed_training: int
    memory_bytes: int
    disk_bytes: int
    activation_bytes: int

    @property
    def config(self) -> dict[str, Any]:
        """The composed config as plain data."""
        return self.composed.config

    @property
    def activations_on_disk(self) -> bool:
        """Whether activations are too large to rest in memory beside the model."""
        return self.activation_bytes > psutil.virtual_memory().available // 2

    def texts(self, model: Any) -> Texts:
        """All texts of the run; those that the model writes need it."""
        texts, _ = cut_all(self.requests, self.tokenizer, model, self.seed_data)
        self.check_texts(texts)
        return texts

    def check_texts(self, texts: Texts) -> dict[str, float]:
        """Roles and overlap; see calibration.roles."""
        evaluation = {
            f"{entry.name}.{name}": text for entry in self.suite for name, text in entry.texts.items()
        }
        corpora = [
            request.source.corpus(request.key)
            for request in self.requests
            if isinstance(request.source, CorpusSource)
        ]
        common = common_runs(self.tokenizer, corpora)
        check_lengths([text.tokens_NT.shape[1] for text in texts.reconstruction])
        return check_roles(
            texts, evaluation, common, run_length(self.tokenizer), self.config["allow_overlap"]
        )


def check(composed: Composed) -> RunPlan:
    """Build and check one run. Raises ConfigError for whatever is wrong, cheap checks first."""
    config, where = composed.config, composed.where
    technique: Technique = build(config["reconstruction"], "reconstruction", where)
    pattern: Pattern = build(config["pattern"], "pattern", where)
    pruner: Pruner = build(config["pruner"], "pruner", where)
    allocation = build(config["allocation"], "allocation", where)
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
    _check_writable(Path(config["output_dir"]))
    device = plan_device(config["device"], config["dtype"], _dtype_of(source), config["threads"])
    tokenizer = load_tokenizer(source)
    shapes = _shapes(source)
    windows_over(shapes.num_blocks, technique.window, technique.stride)
    if pruner.needs.prunes:
        pruner.check(pattern)
        for name, shape in shapes.linears.items():
            pattern.check_shape(name, shape)
    layer_sparsity = allocation.allocate(shapes.num_weights, schedule.steps(sparsity)[-1])
    requests = requests_of(mask_data, reconstruction_data, validation, probes)
    for request in requests:
        request.source.check(request.key)
        resolve_bos(request.source.bos, tokenizer, request.key)
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
        "tokenizer": [tokenizer_identity(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id],
        "texts": [
            {**request.identity, "bos": resolve_bos(request.source.bos, tokenizer, request.key)}
            for request in requests
        ],
        "pruner": _canonical(pruner),
        "pattern": _canonical(pattern),
        "allocation": _canonical(allocation),
        "schedule": _canonical(schedule),
        "technique": _canonical(technique) if technique.trains else None,
        "sparsity": sparsity,
        "seeds": [seed_data, seed_training],
        "dtype": str(device.dtype),
        "device": device.kind,
    }
    folder = RunFolder.of(Path(config["output_dir"]), _label(composed, source), config_hash(identity))
    lengths = {f"{request.key}.length": request.source.length for request in requests}
    lengths |= {
        f"evaluation.{entry.name}.length": text.tokens_NT.shape[1]
        for entry in suite
        for text in entry.texts.values()
    }
    for key, length in lengths.items():
        if length is not None and shapes.max_length is not None and length > shapes.max_length:
            raise ConfigError(
                key, "longer than the model's context", value=length, accepted=f"at most {shapes.max_length}"
            )
    texts, waiting = cut_all(requests, tokenizer, None, seed_data)
    activations = _activation_bytes(texts, waiting, shapes, technique, device)
    memory, disk = _sizes(shapes, technique, device, activations, config)
    plan = RunPlan(
        composed, source, tokenizer, device, shapes, pruner, pattern, sparsity, layer_sparsity, technique, requests,
        suite, tracking, folder, identity, seed_data, seed_training, memory, disk, activations,
    )  # fmt: skip
    _check_room(plan)
    plan.check_texts(texts)
    return plan


def _built(config: Mapping[str, Any], group: str, where: Mapping[str, str]) -> dict[str, Any]:
    nodes = config[group] or {}
    return {name: build(node, f"{group}.{name}", where) for name, node in nodes.items() if node is not None}


def _canonical(built: object) -> dict[str, Any]:
    assert is_dataclass(built)
    assert not isinstance(built, type)
    return {"class": type(built).__qualname__, **asdict(built)}


def _dtype_of(source: ModelSource) -> torch.dtype | None:
    dtype = getattr(load_config(source), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)


def _shapes(source: ModelSource) -> Shapes:
    model, blocks = skeleton(source)
    hidden = model.config.get_text_config().hidden_size
    linears = {
        f"{index}.{name}": view.shape
        for index, block in enumerate(blocks)
        for name, view in linears_of(block).items()
    }
    if not linears:
        raise ConfigError("model", "its blocks have no linear layers that can be pruned", value=source.name)
    return Shapes(
        num_blocks=len(blocks),
        hidden_size=int(hidden),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_block_parameters=sum(parameter.numel() for parameter in blocks.parameters()),
        linears=linears,
        max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


def _label(composed: Composed, source: ModelSource) -> str:
    choices = composed.choices
    technique = choices.get("arm") or choices.get("reconstruction", "reconstruction")
    return "-".join([source.name, choices.get("pruner", "pruner"), technique])


def _activation_bytes(
    texts: Texts, waiting: list[Request], shapes: Shapes, technique: Technique, device: DevicePlan
) -> int:
    tokens = sum(text.tokens_NT.numel() for text in texts.all)
    tokens += sum((request.source.num_sequences or 0) * (request.source.length or 0) for request in waiting)
    # Dense boundaries of a window, the pruned chain, and one being written.
    boundaries = technique.window + 1 + 3
    return tokens * shapes.hidden_size * boundaries * torch.finfo(device.dtype).bits // 8


def _sizes(
    shapes: Shapes, technique: Technique, device: DevicePlan, activations: int, config: Mapping[str, Any]
) -> tuple[int, int]:
    """Expected peak of host memory and disk, bytes: weights, activations, training state; block states, export."""
    width = torch.finfo(device.dtype).bits // 8
    weights = shapes.num_parameters * width
    block = shapes.num_block_parameters // shapes.num_blocks
    training = block * technique.window * 16 if technique.trains else 0
    grams = 4 * 3 * max(columns for _, columns in shapes.linears.values()) ** 2
    memory = weights + activations + training + grams + 700 * 2**20
    disk = shapes.num_block_parameters * width * 17 // 16 + 64 * 2**20
    disk += weights if config["export"]["model"] else 0
    return memory, disk


def _check_room(plan: RunPlan) -> None:
    if plan.folder.finished:
        return
    available = psutil.virtual_memory().available
    needed = plan.memory_bytes - (plan.activation_bytes if plan.activations_on_disk else 0)
    if needed > available:
        raise ConfigError(
            "model",
            f"this run needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free",
            value=plan.source.name,
            hint="use fewer or shorter sequences, dtype=bfloat16, or a smaller model",
        )
    place = _existing(Path(plan.config["output_dir"]))
    free = shutil.disk_usage(place).free
    disk = plan.disk_bytes + (plan.activation_bytes if plan.activations_on_disk else 0)
    if disk > free:
        raise ConfigError(
            "output_dir",
            f"this run needs about {disk / 2**30:.1f} GiB on disk, {free / 2**30:.1f} GiB are free there",
            value=plan.config["output_dir"],
            hint="free space or choose another output_dir",
        )


def _check_writable(output_dir: Path) -> None:
    place = _existing(output_dir)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            "output_dir", f"cannot be written: {place}", value=output_dir, accepted="a writable folder"
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
