"""How files say which weights are kept: a file of masks, the state of a run, a checkpoint that another tool pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reprune.engine.stored_masks import unpack
from reprune.errors import ConfigError
from reprune.model.checkpoint import WeightFiles, content_identity
from reprune.pruning.contract import LayerShape

KEY = "pruner.path"
ACCEPTED = "a safetensors file of masks, the folder of a finished run, or the folder of a pruned checkpoint"
FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class MaskSource(ABC):
    """Tensors in safetensors files, by name, and how they say which weights of a layer are kept.

    `path` is what the user gave; `tensors` tells the file of each tensor.
    """

    path: Path
    tensors: Mapping[str, Path]

    fitting: ClassVar[str]
    """What a layer's tensor has to be."""

    def content(self) -> dict[str, Any]:
        """Hash of every file that masks are read from."""
        first, *others = sorted(set(self.tensors.values()))
        return content_identity(WeightFiles(tuple(others), pickled=False), first)

    def check(self, layers: Mapping[str, LayerShape], known: Collection[str]) -> None:
        """ConfigError unless there is a fitting tensor for each of `layers` and for none that the model lacks.

        `known` are the names of all layers of the model. Reads headers only.
        """
        names = {name: self.tensor(name, layer) for name, layer in layers.items()}
        missing = [name for name, tensor in names.items() if tensor not in self.tensors]
        if missing:
            raise self.refused(
                f"{len(missing)} of {len(names)} layers are missing there, the first is {missing[0]}",
                accepted=f"a tensor {names[missing[0]]} and so on",
                hint=f"masks go with the model they were made for; there are {len(self.tensors)} tensors: "
                f"{', '.join(sorted(self.tensors)[:3])} …",
            )
        extra = self.extra(layers, known)
        if extra:
            raise self.refused(
                f"{len(extra)} of its names are not in the model, the first is {extra[0]}",
                hint="masks go with the model they were made for",
            )
        for name, layer in layers.items():
            with opened(self.tensors[names[name]], self.path) as stream:
                found = stream.get_slice(names[name])
                shape, dtype = tuple(found.get_shape()), str(found.get_dtype())
            problem = self.misfit(name, layer, shape, dtype)
            if problem:
                raise self.refused(f"layer {name}: {problem}", accepted=self.fitting)

    def read(self, tensor: str) -> Tensor:
        """A tensor by its name in the file, on the host."""
        with opened(self.tensors[tensor], self.path) as stream:
            found: Tensor = stream.get_tensor(tensor)
        return found

    def refused(self, problem: str, accepted: str | None = None, hint: str | None = None) -> ConfigError:
        """The error that says why this path will not do."""
        return ConfigError(KEY, problem, value=self.path, accepted=accepted, hint=hint)

    @abstractmethod
    def tensor(self, name: str, layer: LayerShape) -> str:
        """The name of a layer's tensor; ConfigError where it cannot be known."""

    @abstractmethod
    def extra(self, layers: Mapping[str, LayerShape], known: Collection[str]) -> list[str]:
        """What is there for layers or blocks that the model does not have."""

    @abstractmethod
    def misfit(self, name: str, layer: LayerShape, shape: tuple[int, ...], dtype: str) -> str | None:
        """What is wrong with the shape or the safetensors dtype of a layer's tensor."""

    @abstractmethod
    def keep(self, name: str, layer: LayerShape) -> Tensor:
        """A layer's mask, bool [d_out, d_in]; ConfigError for values that are none."""


class MaskFile(MaskSource):
    """Tensors 'BLOCK.LAYER' in the stored layout, what `export.masks=true` writes."""

    fitting = "bool, or uint8 of 0 and 1, in the layout that the model stores"

    def tensor(self, name: str, layer: LayerShape) -> str:
        """The layer's name itself."""
        return name

    def extra(self, layers: Mapping[str, LayerShape], known: Collection[str]) -> list[str]:
        """Tensors that are named like no layer."""
        return sorted(set(self.tensors) - set(known))

    def misfit(self, name: str, layer: LayerShape, shape: tuple[int, ...], dtype: str) -> str | None:
        """See MaskSource."""
        if shape != layer.stored:
            return _other_shape(shape, layer)
        return None if dtype in ("BOOL", "U8") else f"its mask is {dtype}"

    def keep(self, name: str, layer: LayerShape) -> Tensor:
        """See MaskSource."""
        found = self.read(name)
        if found.dtype == torch.uint8 and int(found.max()) > 1:
            raise self.refused(f"layer {name}: its mask holds {int(found.max())}", accepted=self.fitting)
        return layer.orient(found.bool())


class RunMasks(MaskSource):
    """Packed bits 'masks.BLOCK.LAYER' beside the weights, in the state of a run."""

    fitting = "the mask of a run on this model"

    def tensor(self, name: str, layer: LayerShape) -> str:
        """See MaskSource."""
        return f"masks.{name}"

    def extra(self, layers: Mapping[str, LayerShape], known: Collection[str]) -> list[str]:
        """Masks of no layer."""
        masks = {name.removeprefix("masks.") for name in self.tensors if name.startswith("masks.")}
        return sorted(masks - set(known))

    def misfit(self, name: str, layer: LayerShape, shape: tuple[int, ...], dtype: str) -> str | None:
        """Bits alone do not tell 8 × 4 from 4 × 8: the weight beside them does, or all experts' weights in one."""
        for weight, kept in ((f"weights.{name}.weight", slice(None)), (_whole(name), slice(1, None))):
            if weight in self.tensors:
                with opened(self.tensors[weight], self.path) as stream:
                    beside = tuple(stream.get_slice(weight).get_shape())[kept]
                if beside != layer.stored:
                    return _other_shape(beside, layer)
        size = layer.shape[0] * layer.shape[1]
        return None if shape == (-(-size // 8),) else f"its mask has {shape} bytes of bits for {size} weights"

    def keep(self, name: str, layer: LayerShape) -> Tensor:
        """See MaskSource."""
        return layer.orient(unpack(self.read(self.tensor(name, layer)), torch.Size(layer.stored)))


class Checkpoint(MaskSource):
    """A saved transformers model: what is not zero is kept."""

    fitting = "float16, bfloat16 or float32, in the layout that the model stores"

    def content(self) -> dict[str, Any]:
        """Hash of config and weights."""
        return content_identity(
            WeightFiles(tuple(sorted(set(self.tensors.values()))), pickled=False), self.path / "config.json"
        )

    def tensor(self, name: str, layer: LayerShape) -> str:
        """The layer's key, without the base model's prefix where the checkpoint was saved without a head."""
        if layer.key is None:
            raise self.refused(
                f"layer {name} is an expert that shares a parameter with others, which checkpoints name in other ways",
                accepted="the folder of a finished run, or a safetensors file of masks",
            )
        short = layer.key.partition(".")[2]
        return short if layer.key not in self.tensors and short in self.tensors else layer.key

    def extra(self, layers: Mapping[str, LayerShape], known: Collection[str]) -> list[str]:
        """Blocks behind the model's last one."""
        name, layer = next(iter(layers.items()))
        blocks = {name.partition(".")[0] for name in known}
        root = self.tensor(name, layer).removesuffix(f"{name}.weight")
        there = {key.removeprefix(root).partition(".")[0] for key in self.tensors if key.startswith(root)}
        return sorted(f"{root}{block}" for block in there - blocks if block.isdigit())

    def misfit(self, name: str, layer: LayerShape, shape: tuple[int, ...], dtype: str) -> str | None:
        """See MaskSource."""
        if shape != layer.stored:
            return _other_shape(shape, layer)
        return None if dtype in FLOATS else f"its weight is stored as {dtype}"

    def weight(self, name: str, layer: LayerShape) -> Tensor:
        """A layer's weight [d_out, d_in] as the checkpoint has it."""
        return layer.orient(self.read(self.tensor(name, layer)))

    def keep(self, name: str, layer: LayerShape) -> Tensor:
        """See MaskSource; a weight that is not finite is refused."""
        weight = self.weight(name, layer)
        if not bool(torch.isfinite(weight).all()):
            raise self.refused(f"layer {name}: its weight is not finite", accepted="finite weights")
        return weight != 0


@contextmanager
def opened(file: Path, path: Path) -> Iterator[Any]:
    """A safetensors file, open. ConfigError, naming the `path` that was given, where it is none or damaged."""
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            KEY,
            f"{file.name} is damaged or no safetensors file: {error}",
            value=path,
            accepted=ACCEPTED,
            hint="copy it again; pickles (.pt, .bin) are not read, save them as safetensors",
        ) from error


def _whole(expert: str) -> str:
    return f"weights.{expert.rpartition('.')[0]}"


def _other_shape(shape: tuple[int, ...], layer: LayerShape) -> str:
    return f"{list(shape)} is there, the model stores {list(layer.stored)}"
