"""What is known of a model without its weights, and what a run of it takes in memory and on disk."""

from __future__ import annotations

import math
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
from reprune.model.submodules import tied_blocks
from reprune.model.targets import targeted
from reprune.pruning.contract import LayerShape, Needs
from reprune.reconstruction.technique import LANGUAGE, Technique
from reprune.sparsity.allocation import Layers
from reprune.transform.contract import Transform

LIBRARIES = 700 * 2**20
"""Bytes of host memory that Python and its libraries take."""


@dataclass(frozen=True)
class Shapes:
    """A model's sizes and prunable layers ('block.name'); `targets` are those that the run prunes.

    `tied` are two places of one tensor, where blocks share any. They are those of the transformed model where there is a transform; `num_loaded` counts the parameters before it.
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
    tied: str | None

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
        tied=tied_blocks(model, blocks),
        max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


@dataclass(frozen=True)
class Sizes:
    """What a run takes at its peak, in bytes.

    In host memory: `base`, whatever rests where; `weights` of the whole model, or `weights_at_once` of them where
    blocks rest on disk; `activations`, unless they are files. `disk` is without the latter; `on_device` is a window with
    what its training takes, without a pass's activations.
    """

    base: int
    weights: int
    weights_at_once: int
    activations: int
    disk: int
    on_device: int

    def of_processes(self, count: int) -> Sizes:
        """Of a run by that many processes of one machine, which share the activations and nothing else in memory."""
        each = self.base, self.weights, self.weights_at_once
        base, weights, at_once = (count * part for part in each)
        return replace(self, base=base, weights=weights, weights_at_once=at_once)

    def with_masks_of(self, num_weights: int) -> Sizes:
        """With all masks in memory when they are written by one process, a byte a weight, and nothing else is left there."""
        return replace(self, base=max(self.base, num_weights + LIBRARIES))


def sizes_of(
    texts: Texts,
    waiting: list[Request],
    shapes: Shapes,
    technique: Technique,
    device: DevicePlan,
    needs: Needs,
    second_gram: bool,
    num_rounds: int,
    exports_model: bool,
    exports_compact: bool,
    windows_at_once: int = 1,
) -> Sizes:
    """Weights, activations, statistics, dense copies, masks and training state; block states and exports.

    `second_gram` says that a refinement reads a Gram of other text than the pruner; `windows_at_once` are those between
    which processes are spread. Of a smaller model only the bound is known, the model's own size.
    """
    width = torch.finfo(device.dtype).bits // 8
    window = technique.window or shapes.num_blocks
    there = min(window * windows_at_once, shapes.num_blocks)
    tokens = sum(text.tokens_NT.numel() for text in texts.all)
    tokens += sum((request.source.num_sequences or 0) * (request.source.length or 0) for request in waiting)
    # Dense boundaries of the windows, the pruned chain, and one being written.
    activations = tokens * shapes.hidden_size * (there + 1 + 3) * width
    if needs.gradients:
        # Every boundary of the dense chain, and two of gradients in float32.
        activations = max(activations, tokens * shapes.hidden_size * ((shapes.num_blocks + 2) * width + 8))
    weights = shapes.num_loaded * width
    block = shapes.num_block_parameters // shapes.num_blocks
    outside = shapes.num_parameters - shapes.num_block_parameters
    training = _training(texts, shapes, technique, needs, block * window, outside, width)
    dense = block * window * width if technique.needs_dense_weights or num_rounds > 1 else 0
    if windows_at_once > 1:
        # A process's own window as it was pruned and as it was trained.
        dense += 2 * block * window * width
    statistics = _statistics(shapes, technique, needs, second_gram)
    # A byte a weight; those of frozen blocks are on disk.
    masks = shapes.num_prunable * there // shapes.num_blocks
    # Statistics are gone when training begins.
    base = max(training, statistics) + dense + masks + LIBRARIES
    if exports_compact:
        # Read back beside the model, with a block in float32.
        base = max(base, weights + 4 * block + LIBRARIES)
    disk = shapes.num_block_parameters * width * 17 // 16 + 64 * 2**20
    disk += weights * (exports_model + exports_compact)
    disk += 8 * shapes.num_block_parameters if needs.gradients else 0
    # A block is read beside its place; a file is mapped while it is written.
    at_once = (outside + block * (min(2 * window, there) + 1)) * width
    return Sizes(
        base, weights, at_once, activations, disk, block * window * width + max(training, statistics)
    )


def _training(
    texts: Texts,
    shapes: Shapes,
    technique: Technique,
    needs: Needs,
    window: int,
    outside: int,
    width: int,
) -> int:
    """What training or gradients take beside weights in the run's dtype, of `width` bytes; `window` and `outside` are parameters."""
    # Float32 weights in place of the run's own, gradient and two moments, and the mask; the best weights so far; the anchor.
    each = 17 - width + 4 * (technique.stop_on is not None) + 4 * (technique.anchor > 0)
    training = window * each if technique.trains else 0
    if technique.trains and technique.loss == LANGUAGE:
        logits = technique.batch_size * max(
            (text.tokens_NT.shape[1] for text in texts.reconstruction), default=0
        )
        training += 4 * outside + 8 * logits * shapes.vocabulary_size
    if technique.last_layer_iterations:
        # Weights and masks; two Grams and one to solve by, their right-hand sides, and what the iterations hold.
        d_out, d_in = list(shapes.linears.values())[-1]
        training = max(training, window * (5 - width) + 4 * (3 * d_in**2 + 10 * d_out * d_in))
    # A block in float32 with its gradients, their sums and their squares; files of the latter for all blocks.
    block = shapes.num_block_parameters // shapes.num_blocks
    return max(training, block * 24 if needs.gradients or needs.block_gradients else 0)


def _statistics(shapes: Shapes, technique: Technique, needs: Needs, second_gram: bool) -> int:
    """Grams of one block's layers and their factors, float32, with what a factorisation takes; as many again for a solver and a refinement."""
    solves = technique.layerwise is not None and technique.layerwise.reads_gram
    if not (needs.gram or solves):
        return 0
    by_block: Counter[str] = Counter()
    for name, layer in shapes.layers.items():
        by_block[name.partition(".")[0]] += layer.shape[1] ** 2
    largest = max(layer.shape[1] ** 2 for layer in shapes.layers.values())
    # Layers with one input are solved side by side: their weights before and after, and a mask.
    beside = 9 * 2 * max(math.prod(layer.shape) for layer in shapes.layers.values())
    return 4 * (2 * (needs.gram + solves + second_gram) * max(by_block.values()) + 3 * largest) + beside


def check_room(host: int, disk: int, output_dir: Path, model: str) -> None:
    """ConfigError for a run that host memory or disk have no room for, in bytes."""
    available = psutil.virtual_memory().available
    if host > available:
        raise ConfigError(
            "model",
            f"this run needs about {host / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free",
            value=model,
            hint="use fewer or shorter sequences, dtype=bfloat16, or a smaller model",
        )
    free = shutil.disk_usage(existing(output_dir)).free
    if disk > free:
        raise ConfigError(
            "output_dir",
            f"this run needs about {disk / 2**30:.1f} GiB on disk, {free / 2**30:.1f} GiB are free there",
            value=output_dir,
            hint="free space or choose another output_dir",
        )


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
