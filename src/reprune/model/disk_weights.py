"""Weights of blocks that rest on disk: in the checkpoint at first, in the run's state once a window is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from reprune.model.blocks import Resident
from reprune.model.hollow import Checkpoint, empty, put
from reprune.tensor_files import write_tensors

Home = int | tuple[Path, str]
"""A block's number in the checkpoint, or a file and what its tensors' names begin with there."""


@dataclass
class DiskWeights:
    """Reads a block's weights when they are wanted, and lets them go afterwards.

    What is done to them in between is lost unless the block was given a new home meanwhile: see `moved`.
    """

    checkpoint: Checkpoint
    _homes: dict[nn.Module, Home] = field(default_factory=dict)
    _held: dict[nn.Module, int] = field(default_factory=dict)

    def of(self, blocks: Sequence[nn.Module]) -> None:
        """Take care of a model's blocks, which are the checkpoint's, in its order."""
        self._homes = {block: number for number, block in enumerate(blocks)}

    def moved(self, block: nn.Module, path: Path, prefix: str) -> None:
        """From now on a block is read from a safetensors file, in which its tensors' names begin with `prefix`."""
        self._homes[block] = path, prefix

    @contextmanager
    def resident(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Have blocks in host memory for the context; those that are there already stay afterwards."""
        with ExitStack() as stack:
            for block in blocks:
                self._hold(block)
                stack.callback(self._let_go, block)
            yield

    @contextmanager
    def in_turn(self, blocks: Sequence[nn.Module], holding: Resident) -> Iterator[None]:
        """In the context each block is held, as `holding` does it, while it computes, and at no other time."""
        open_now: dict[nn.Module, ExitStack] = {}

        def fetch(block: nn.Module, inputs: Any) -> None:
            open_now[block] = ExitStack()
            open_now[block].enter_context(holding(block))

        def give_back(block: nn.Module, inputs: Any, output: Any) -> None:
            stack = open_now.pop(block, None)
            if stack is not None:
                stack.close()

        handles = [block.register_forward_pre_hook(fetch) for block in blocks]
        # Also where a pass does not fit, so that the next try finds no more in memory than the first.
        handles += [block.register_forward_hook(give_back, always_call=True) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for stack in open_now.values():
                stack.close()

    def read(self, block: nn.Module) -> dict[str, Tensor]:
        """A block's tensors by name within it, from where they rest."""
        home = self._homes[block]
        if isinstance(home, int):
            return self.checkpoint.block(home)
        path, prefix = home
        with safe_open(path, framework="pt") as stream:
            names = [name for name in stream.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): stream.get_tensor(name) for name in names}

    def _hold(self, block: nn.Module) -> None:
        if block in self._held:
            self._held[block] += 1
            return
        found = self.read(block)
        self._held[block] = 1
        for name, tensor in found.items():
            path, _, own = name.rpartition(".")
            put(block.get_submodule(path), own, tensor)
        for module in block.modules():
            for own, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    # Only biases that the run gave to the model are in no file until the block is pruned.
                    assert own == "bias", f"{own} of {type(module).__name__} is in no file"
                    put(module, own, torch.zeros_like(parameter, device="cpu"))

    def _let_go(self, block: nn.Module) -> None:
        self._held[block] -= 1
        if not self._held[block]:
            del self._held[block]
            empty(block)

    def save(self, model: Any, blocks: nn.ModuleList, path: str, folder: Path) -> None:
        """Write a model as transformers does, a file for each block and one for the rest; `path` leads to its blocks."""
        from transformers.core_model_loading import revert_weight_conversion

        outside = {name: it for name, it in model.state_dict().items() if not name.startswith(f"{path}.")}
        model.save_pretrained(folder, state_dict=outside)
        total = 1 + len(blocks)

        def shard(number: int) -> str:
            return f"model-{number:05d}-of-{total:05d}.safetensors"

        (folder / "model.safetensors").rename(folder / shard(1))
        where, num_bytes = dict[str, str](), 0
        for number, block in enumerate(blocks, 2):
            with self.resident([block]):
                named = {f"{path}.{number - 2}.{name}": it for name, it in block.state_dict().items()}
                tensors = revert_weight_conversion(model, named)
                write_tensors(folder / shard(number), tensors, {"format": "pt"})
        for number in range(1, total + 1):
            with safe_open(folder / shard(number), framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 (a safetensors file, not a dict)
                    where[name] = shard(number)
            num_bytes += (folder / shard(number)).stat().st_size
        index = {"metadata": {"total_size": num_bytes}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )
