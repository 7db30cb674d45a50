"""A checkpoint whose blocks are read one at a time: the library's own renaming and conversion of keys, a block's keys only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from reprune.errors import ConfigError, RunError
from reprune.model.blocks import find_blocks
from reprune.model.checkpoint import ModelSource, weight_files
from reprune.model.description import load_config, num_blocks
from reprune.model.submodules import tied_blocks

OUTSIDE = None
"""The key of what belongs to no block."""


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors and a model on the meta device that knows what the library makes of their keys.

    `keys` are those of the files by block (None: outside the blocks), each with the file that it lies in.
    """

    model: Any
    blocks: nn.ModuleList
    keys: Mapping[int | None, Mapping[str, Path]]
    dtype: torch.dtype
    mapping: list[Any]

    def block(self, number: int) -> dict[str, Tensor]:
        """The parameters and buffers of a block by name within it, in host memory. RunError where one is missing."""
        block = self.blocks[number]
        self._load(number)
        try:
            found = dict(block.state_dict())
            missing = sorted(name for name, tensor in found.items() if tensor.is_meta)
            if missing:
                raise _missing(f"block {number}", missing)
            return found
        finally:
            empty(block)

    def fill(self, model: Any) -> None:
        """Read what lies outside the blocks into a model like this one. RunError where something is missing."""
        info = self._load(OUTSIDE, model)
        model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)
        model.requires_grad_(False)
        inside = {id(module) for module in model.get_submodule(_path(self.model, self.blocks)).modules()}
        missing = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            for name, tensor in module.named_parameters(recurse=False)
            if id(module) not in inside and tensor.is_meta
        ]
        if missing:
            raise _missing("outside the blocks", missing)

    def _load(self, part: int | None, model: Any = None) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        model = self.model if model is None else model
        config = LoadStateDictConfig(
            dtype=self.dtype, dtype_plan=model._get_dtype_plan(self.dtype), weight_mapping=self.mapping
        )
        keys = self.keys[part]
        with ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in {*keys.values()}}
            slices = {key: files[path].get_slice(key) for key, path in keys.items()}
            shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
            try:
                info, _ = convert_and_load_state_dict_in_model(model, slices, config)
            finally:
                if shown:
                    logging.enable_progress_bar()
        wrong = [key for key, *_ in info.mismatched_keys]
        if wrong or info.conversion_errors:
            raise _missing("its files", [*wrong, *info.conversion_errors])
        return info


def open_checkpoint(source: ModelSource, dtype: torch.dtype) -> tuple[Checkpoint, Any]:
    """A checkpoint, and the model it is of with all but its blocks in host memory, ready for evaluation.

    Raises ConfigError for models whose blocks cannot be read one at a time: those that share weights between blocks.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    folder = source.folder()
    config = load_config(source)
    donor, model = hollow(source, config, dtype), hollow(source, config, dtype)
    blocks = find_blocks(donor, num_blocks(config), source.blocks_path)
    tied = tied_blocks(donor, blocks)
    if tied is not None:
        raise ConfigError(
            "memory.weights", f"{tied} are one tensor, so that blocks cannot be read one at a time", value=source.name,
            accepted="memory", hint="set memory.weights=memory, and raise memory.host_limit",
        )  # fmt: skip
    mapping = get_model_conversion_mapping(donor)
    keys = _by_block(donor, blocks, weight_files(folder, "model", allow_bin=False).paths, mapping)
    checkpoint = Checkpoint(donor, blocks, keys, dtype, mapping)
    checkpoint.fill(model)
    # As the library leaves it behind a load, so that what is saved gets the names of the checkpoint.
    model._weight_conversions = [conversion for conversion in mapping if conversion.was_used()]
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return checkpoint, model


def hollow(source: ModelSource, config: Any, dtype: torch.dtype) -> Any:
    """The model of a config in evaluation mode: its parameters on the meta device, its buffers in host memory."""
    from transformers import AutoModelForCausalLM

    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=source.trust_remote_code
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def empty(block: nn.Module) -> None:
    """Let go of a block's parameters; their shapes stay."""
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            put(module, name, torch.empty_like(parameter, device="meta"))


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor a module's parameter or buffer of that name."""
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        module._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """In the context every parameter goes to the meta device the moment a module gets it; buffers are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(
            module,
            name,
            None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False),
        )

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _by_block(
    model: Any, blocks: nn.ModuleList, paths: Collection[Path], mapping: list[Any]
) -> dict[int | None, dict[str, Path]]:
    """The keys of the files by the block that the library puts them into."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected, root = model.state_dict(), f"{_path(model, blocks)}."
    found: dict[int | None, dict[str, Path]] = {OUTSIDE: {}, **{number: {} for number in range(len(blocks))}}
    for path in paths:
        with safe_open(path, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 (a safetensors file, not a dict)
                renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
                if renamed not in expected and key in expected:
                    renamed = key
                number = renamed.removeprefix(root).partition(".")[0] if renamed.startswith(root) else ""
                found[int(number) if number.isdigit() else OUTSIDE][key] = path
    return found


def _path(model: nn.Module, blocks: nn.ModuleList) -> str:
    return str(next(name for name, module in model.named_modules() if module is blocks))


def _missing(where: str, names: Collection[str]) -> RunError:
    return RunError(
        f"{where}: {len(names)} weights are missing or have another shape than the config says "
        f"({', '.join(list(names)[:3])} …); save the model again with save_pretrained()"
    )
