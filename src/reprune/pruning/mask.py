"""Pruner `mask`: a mask that is there already, so that it can be reconstructed in several ways."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from reprune.cache import cached_folder
from reprune.engine.stored_masks import pack, unpack
from reprune.errors import ConfigError
from reprune.files import read_json, write_json
from reprune.pruning.contract import LayerContext, LayerShape, Needs, Pruned, require_finite
from reprune.pruning.mask_files import KEY, Checkpoint, MaskSource
from reprune.pruning.mask_places import open_source
from reprune.sparsity.patterns import Group, Pattern, Unstructured
from reprune.tensor_files import write_tensors


@dataclass(kw_only=True)
class Mask:
    """M from `path`: a safetensors file of masks, the folder of a finished run, or a checkpoint's zeros.

    `weights` under it: 'dense' leaves the model's own, 'file' takes the checkpoint's (those of the pruned layers only:
    norms, biases and embeddings stay the model's).
    """

    path: str
    weights: Literal["dense", "file"] = "dense"

    needs: ClassVar[Needs] = Needs()
    _brought: _Brought | None = field(init=False, repr=False, default=None)

    def check(self, pattern: Pattern) -> None:
        """ConfigError for units. Whether the mask conforms to another pattern is known once it is read: see `brings`."""
        if pattern.units:
            raise ConfigError(
                "pattern", "whole units are chosen by scores, and this mask is there already", value="structured",
                accepted="unstructured, for a mask of whole units too", hint="pattern=unstructured",
            )  # fmt: skip

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """See Pruner. Raises ConfigError for a path, masks or weights that cannot be used with these layers."""
        source = open_source(Path(self.path))
        if self.weights == "file" and not isinstance(source, Checkpoint):
            exported = Path(self.path) / "model"
            raise ConfigError(
                "pruner.weights",
                f"only the folder of a checkpoint has weights to take, not {self.path}",
                value=self.weights,
                accepted="dense",
                hint=f"pruner.path={exported}" if exported.is_dir() else None,
            )
        source.check(layers, known)
        brought = _Brought(source, dict(layers), _packed(source, layers))
        brought.check(pattern)
        self._brought = brought
        return brought.sparsity

    def identity(self) -> dict[str, Any]:
        """Hash of the mask's bits, wherever they came from, and of the weights if they are taken too."""
        brought = self._known()
        weights = brought.source.content() if self.weights == "file" else "dense"
        return {"mask": brought.facts["bits"], "weights": weights}

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See Pruner."""
        name, brought = f"{layer.block}.{layer.name}", self._known()
        keep = brought.keep(name).to(layer.weight.device)
        if self.weights == "dense":
            return Pruned(torch.where(keep, layer.weight, 0), keep)
        assert isinstance(brought.source, Checkpoint)
        # Its zeros are the mask: nothing is left to set to zero, and their signs stay as they are.
        weight = brought.source.weight(name, brought.layers[name]).to(layer.weight, copy=True)
        require_finite(weight, layer)
        return Pruned(weight, keep)

    def _known(self) -> _Brought:
        assert self._brought is not None, "the masks are read by `brings`"
        return self._brought


@dataclass(frozen=True)
class _Brought:
    """Masks of `layers`, packed in a folder of the cache, and where they are from."""

    source: MaskSource
    layers: dict[str, LayerShape]
    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        """'bits', a hash of all masks, and 'removed', how many weights by layer."""
        found: dict[str, Any] = read_json(self.folder / "facts.json")
        return found

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of the weights that are removed, by layer."""
        removed = self.facts["removed"]
        return {
            name: removed[name] / (layer.shape[0] * layer.shape[1]) for name, layer in self.layers.items()
        }

    def keep(self, name: str) -> Tensor:
        """A layer's mask, bool [d_out, d_in], on the host."""
        with safe_open(self.folder / "masks.safetensors", framework="pt") as stream:
            return unpack(stream.get_tensor(name), torch.Size(self.layers[name].shape))

    def check(self, pattern: Pattern) -> None:
        """ConfigError, naming the first layer, unless every mask is one that the pattern could have made.

        That a mask conforms is remembered: for 7 billion weights, finding out takes minutes.
        """
        if isinstance(pattern, Unstructured):
            return
        assert is_dataclass(pattern)
        assert not isinstance(pattern, type)
        told = {"class": type(pattern).__qualname__, **asdict(pattern)}

        def compare(folder: Path) -> None:
            for name, measured in self.sparsity.items():
                # Groups of columns have a sparsity of their own, whatever share a mask removes.
                share = measured if pattern.varies else pattern.resolve(None)
                keep = self.keep(name)
                if not torch.equal(pattern.keep(keep.float(), share, Group.MATRIX), keep):
                    raise ConfigError(
                        "pattern",
                        f"the mask of layer {name} does not conform to it ({self.source.path})",
                        value=", ".join(f"{key}={value}" for key, value in told.items() if key != "class"),
                        hint="pattern=unstructured takes every mask as it is",
                    )

        cached_folder("conforming_masks", {"bits": self.facts["bits"], "pattern": told}, compare)


def _packed(source: MaskSource, layers: Mapping[str, LayerShape]) -> Path:
    """Read every mask once, layer by layer; later runs read an eighth of a byte a weight instead of the weights."""
    key = {
        "kind": type(source).__qualname__,
        **source.content(),
        "layers": {name: [*layer.shape, layer.transposed] for name, layer in layers.items()},
    }

    def make(folder: Path) -> None:
        digest, packed, removed = hashlib.sha256(), {}, {}
        for name, layer in sorted(layers.items()):
            keep = source.keep(name, layer)
            packed[name] = pack(keep)
            removed[name] = int((~keep).sum())
            digest.update(f"{name} {layer.shape} ".encode())
            digest.update(packed[name].numpy().tobytes())
        if isinstance(source, Checkpoint) and not any(removed.values()):
            raise ConfigError(
                KEY,
                f"this checkpoint is not pruned: no weight of its {len(layers)} layers is zero",
                value=source.path,
                accepted="a checkpoint with zeros where weights were removed",
                hint="the dense model is pruner=none",
            )
        write_tensors(folder / "masks.safetensors", packed)
        write_json(folder / "facts.json", {"bits": digest.hexdigest(), "removed": removed})

    return cached_folder("masks", key, make)
