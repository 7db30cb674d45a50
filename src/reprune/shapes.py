"""What is known of a model without its weights, and what a run of it takes in memory and on disk."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from reprune.calibration.gather import Request
from reprune.calibration.roles import Texts
from reprune.errors import ConfigError
from reprune.model.checkpoint import ModelSource
from reprune.model.description import hidden_size_of, skeleton
from reprune.model.device import DevicePlan
from reprune.model.linears import linears_of
from reprune.model.targets import targeted
from reprune.pruning.contract import LayerShape, Needs
from reprune.reconstruction.technique import LANGUAGE, Technique
from reprune.sparsity.allocation import Layers
from reprune.transform.contract import Transform


@dataclass(frozen=True)
class Shapes:
    """A model's sizes and prunable layers ('block.name'); `targets` are those that the run prunes.

    They are those of the transformed model where there is a transform; `num_loaded` counts the parameters before it.
    """

    num_blocks: int
    hidden_size: int
    vocabulary_size: int
    num_parameters: int
    num_loaded: int
    num_block_parameters: int
    layers: dict[str, LayerShape]
    targets: list[str]
    max_length: int | None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by layer."""
        return {name: layer.shape for name, layer in self.layers.items()}

    @property
    def target_layers(self) -> dict[str, LayerShape]:
        """The layers that are pruned."""
        return {name: self.layers[name] for name in self.targets}

    @property
    def to_allocate(self) -> Layers:
        """The layers that are pruned, as allocations see them."""
        return Layers({name: layer.shape for name, layer in self.target_layers.items()})

    @property
    def num_prunable(self) -> int:
        """Weights of all prunable layers, whether they are pruned or not."""
        return sum(d_out * d_in for d_out, d_in in self.linears.values())

    @property
    def num_weights(self) -> dict[str, int]:
        """Weights by layer, of those that are pruned."""
        return {name: layer.shape[0] * layer.shape[1] for name, layer in self.target_layers.items()}


def shapes_of(source: ModelSource, targets: str, target_blocks: str, transform: Transform) -> Shapes:
    """The shapes of a model, transformed if it will be.

    ConfigError for one without prunable layers, for targets that hit none, and for a transform that cannot be.
    """
    model, blocks = skeleton(source)
    num_loaded = sum(parameter.numel() for parameter in model.parameters())
    try:
        transform.outline(source, model, blocks)
    except ConfigError as error:
        raise error.under("transform") from None
    [root] = [path for path, module in model.named_modules() if module is blocks]
    views = [linears_of(block) for block in blocks]
    layers = {}
    for index, (block, own) in enumerate(zip(blocks, views, strict=True)):
        for name, view in own.items():
            whole = block.get_parameter(view.parameter).dim() == 2
            key = f"{root}.{index}.{view.parameter}" if whole else None
            layers[f"{index}.{name}"] = LayerShape(view.shape, view.transposed, key, view.is_expert)
    if not layers:
        raise ConfigError("model", "its blocks have no linear layers that can be pruned", value=source.name)
    return Shapes(
        num_blocks=len(blocks),
        hidden_size=hidden_size_of(model),
        vocabulary_size=int(model.config.get_text_config().vocab_size),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_loaded=num_loaded,
        num_block_parameters=sum(parameter.numel() for parameter in blocks.parameters()),
        layers=layers,
        targets=targeted(list(blocks), views, targets, target_blocks),
        max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


@dataclass(frozen=True)
class Sizes:
    """Expected peaks of a run in bytes: host memory with activations in it, disk without them, activations alone.

    `shared` says that several processes work on it, whose memory is added up.
    """

    memory: int
    disk: int
    activations: int
    shared: bool = False

    def of_processes(self, count: int) -> Sizes:
        """Of a run by that many processes, which share the activations and nothing else."""
        if count == 1:
            return self
        memory = (self.memory - self.activations) * count + self.activations
        return replace(self, memory=memory, shared=True)

    @property
    def activations_on_disk(self) -> bool:
        """Whether activations are too large to rest in memory beside the model, or read by several processes."""
        return self.shared or self.activations > psutil.virtual_memory().available // 2


def sizes_of(
    texts: Texts,
    waiting: list[Request],
    shapes: Shapes,
    technique: Technique,
    device: DevicePlan,
    needs: Needs,
    num_rounds: int,
    exports_model: bool,
    exports_compact: bool,
) -> Sizes:
    """Weights, activations, statistics, dense copies and training state; block states and exports.

    Of a smaller model only the bound is known, the model's own size.
    """
    width = torch.finfo(device.dtype).bits // 8
    window = technique.window or shapes.num_blocks
    tokens = sum(text.tokens_NT.numel() for text in texts.all)
    tokens += sum((request.source.num_sequences or 0) * (request.source.length or 0) for request in waiting)
    # Dense boundaries of a window, the pruned chain, and one being written.
    activations = tokens * shapes.hidden_size * (window + 1 + 3) * width
    if needs.gradients:
        # Every boundary of the dense chain, and two of gradients in float32.
        activations = max(activations, tokens * shapes.hidden_size * ((shapes.num_blocks + 2) * width + 8))
    weights = shapes.num_loaded * width
    block = shapes.num_block_parameters // shapes.num_blocks
    # Float32 weights, gradient and two moments; the best weights so far; the anchor.
    each = 16 + 4 * (technique.stop_on is not None) + 4 * (technique.anchor > 0)
    training = block * window * each if technique.trains else 0
    if technique.trains and technique.loss == LANGUAGE:
        outside = shapes.num_parameters - shapes.num_block_parameters
        logits = technique.batch_size * max(
            (text.tokens_NT.shape[1] for text in texts.reconstruction), default=0
        )
        training += 4 * outside + 8 * logits * shapes.vocabulary_size
    dense = block * window * width if technique.needs_dense_weights or num_rounds > 1 else 0
    # A block in float32 with its gradients, their sums and their squares; files of the latter for all blocks.
    training = max(training, block * 24 if needs.gradients or needs.block_gradients else 0)
    memory = weights + activations + training + dense + _statistics(shapes, technique) + 700 * 2**20
    if exports_compact:
        # Read back beside the model, with a block in float32.
        memory = max(memory, 2 * weights + 4 * block + 700 * 2**20)
    disk = shapes.num_block_parameters * width * 17 // 16 + 64 * 2**20
    disk += weights * (exports_model + exports_compact)
    disk += 8 * shapes.num_block_parameters if needs.gradients else 0
    return Sizes(memory, disk, activations)


def _statistics(shapes: Shapes, technique: Technique) -> int:
    """Grams of one block and their factors, float32: of every expert, and of about three other inputs; what solves."""
    by_block: Counter[str] = Counter()
    for name, layer in shapes.layers.items():
        if layer.expert:
            by_block[name.split(".")[0]] += layer.shape[1] ** 2
    experts = max(by_block.values(), default=0)
    largest = max((layer.shape[1] ** 2 for layer in shapes.layers.values()), default=0)
    sets = 4 if technique.layerwise is not None and technique.layerwise.reads_gram else 2
    return 4 * (sets * (experts + 3 * largest) + 4 * largest)


def check_room(sizes: Sizes, output_dir: Path, model: str) -> None:
    """ConfigError for a run that memory or disk have no room for."""
    available = psutil.virtual_memory().available
    elsewhere = sizes.activations if sizes.activations_on_disk else 0
    if sizes.memory - elsewhere > available:
        raise ConfigError(
            "model",
            f"this run needs about {(sizes.memory - elsewhere) / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free",
            value=model,
            hint="use fewer or shorter sequences, dtype=bfloat16, or a smaller model",
        )
    free = shutil.disk_usage(existing(output_dir)).free
    if sizes.disk + elsewhere > free:
        raise ConfigError(
            "output_dir",
            f"this run needs about {(sizes.disk + elsewhere) / 2**30:.1f} GiB on disk, {free / 2**30:.1f} GiB are free there",
            value=output_dir,
            hint="free space or choose another output_dir",
        )


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
