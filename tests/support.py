"""Tiny models, random texts and a block loop around them, for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from reprune.build import build
from reprune.calibration.roles import Texts
from reprune.calibration.source import Role, TextSet
from reprune.config_files import config_root
from reprune.engine.activations import Stores
from reprune.engine.loop import BlockLoop
from reprune.engine.pruning_plan import PruningPlan
from reprune.engine.state import RunState
from reprune.engine.statistics import InputStatistics
from reprune.engine.windows import BlockWindow
from reprune.model.description import load_tokenizer
from reprune.model.device import DTYPES, DevicePlan
from reprune.model.loading import LoadedModel, load_model
from reprune.model.tiny import TinyModel
from reprune.pruning.contract import GradientStatistics, LayerContext, Pruner
from reprune.pruning.magnitude import Magnitude
from reprune.reconstruction.technique import Technique
from reprune.resources import StageMeter
from reprune.seeding import generator
from reprune.sparsity.one_shot import OneShot
from reprune.sparsity.patterns import Pattern, Unstructured
from reprune.sparsity.schedule import Schedule

CONF = config_root() / "conf"
CPU = torch.device("cpu")

# Sliding windows of 4 tokens are shorter than the texts below, so that mixed attention types matter.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": None},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {},
    "olmo2": {},
    "mpt": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "sliding_window": 4,
    },
}
MIXED_ATTENTION = ("qwen2", "gemma2", "gemma3_text")


def load_tiny(
    architecture: str = "llama",
    *,
    num_blocks: int = 3,
    dtype: str = "float32",
    device: torch.device = CPU,
    **config: Any,
) -> LoadedModel:
    """A fresh tiny model whose blocks do something: fan-in scaled matrices, norms and biases away from 1 and 0."""
    fields = {**ARCHITECTURES.get(architecture, {}), **config}
    source = TinyModel(architecture=architecture, num_blocks=num_blocks, config=fields)
    plan = DevicePlan(device, DTYPES[dtype], torch.get_num_threads())
    model = load_model(source, load_tokenizer(source), plan)
    stream = generator(0, "weights", architecture)
    with torch.no_grad():
        for parameter in model.model.parameters():
            noise = torch.randn(parameter.shape, generator=stream)
            if parameter.dim() == 1:
                parameter.add_((0.2 * noise).to(parameter.dtype))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def random_text(name: str, role: Role = "calibration", num_sequences: int = 6, length: int = 12) -> TextSet:
    """Random tokens of the tiny tokenizer, without its special tokens; the same for the same arguments."""
    stream = generator(0, "text", name, role, num_sequences, length)
    tokens = torch.randint(2, 258, (num_sequences, length), generator=stream)
    return TextSet(name, role, tokens, (f"{role}/{name}",), {"name": name}, "as_tokenised")


def some_texts(num_sequences: int = 6, length: int = 12) -> Texts:
    """One calibration text for mask and reconstruction, a second for reconstruction, and a probe of another length."""
    mask = random_text("mask", num_sequences=num_sequences, length=length)
    more = random_text("more", num_sequences=3, length=length)
    probe = random_text("probe", "probe", num_sequences=2, length=length - 3)
    return Texts(mask=[mask], reconstruction=[mask, more], probes=[probe])


class Quiet:
    """A listener that only counts optimiser steps."""

    def __init__(self) -> None:
        self.steps = 0

    def window(self, window: BlockWindow, num_blocks: int, steps: int) -> None:
        """Nothing."""

    def step(self) -> None:
        """Count."""
        self.steps += 1

    def frozen(self, row: Mapping[str, Any]) -> None:
        """Nothing."""


def block_loop(
    model: LoadedModel,
    folder: Path,
    *,
    texts: Texts | None = None,
    pruner: Pruner | None = None,
    pattern: Pattern | None = None,
    sparsity: float = 0.5,
    technique: Technique | None = None,
    schedule: Schedule | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    on_disk: bool = False,
) -> BlockLoop:
    """A block loop over `model` whose state lies in `folder`; by default magnitude at 50 %, no reconstruction."""
    every = [f"{index}.{name}" for index, linears in enumerate(model.linears) for name in linears]
    names = every if targets is None else targets
    schedule = schedule or OneShot()
    rounds = [dict.fromkeys(names, step) for step in schedule.steps(sparsity)]
    plan = PruningPlan(
        pruner or Magnitude(), pattern or Unstructured(), rounds, seed, schedule.masks, schedule.reconstruct
    )
    hidden_size = model.model.config.get_text_config().hidden_size
    return BlockLoop(
        model=model,
        texts=texts or some_texts(),
        pruning=plan,
        technique=technique or preset("none"),
        stores=Stores(model.plan.dtype, hidden_size, folder / "activations", on_disk),
        state=RunState(folder / "state"),
        meter=StageMeter(model.plan),
        listener=Quiet(),
        seed_training=seed,
        after_commit=lambda windows, rows, new: None,
    )


def options(group: str) -> list[str]:
    """The names of all options of a group: its YAML files, found when the tests are collected."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def option(group: str, name: str, **overrides: Any) -> Any:
    """The object that an option's YAML stands for."""
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return build({**node, **overrides}, group)


def preset(name: str, **overrides: Any) -> Technique:
    """A reconstruction technique from its YAML."""
    technique: Technique = option("reconstruction", name, **overrides)
    return technique


def trained_preset(name: str, **overrides: Any) -> Technique:
    """A technique that gets somewhere on a tiny model in a few steps."""
    quick = {} if name == "none" else {"epochs": 3, "batch_size": 4, "learning_rate": 3e-3}
    return preset(name, **{**quick, **overrides})


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors of a module."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: Mapping[str, Tensor], module: nn.Module) -> set[str]:
    """Names of the tensors of `module` that differ in any bit from an earlier `state_of`."""
    after = module.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@torch.no_grad()
def block_outputs(model: LoadedModel, tokens_NT: Tensor, batch: int | None = None) -> list[Tensor]:
    """What every block puts out in a plain forward pass of the whole model: [sequences, tokens, hidden] a block."""
    found: list[list[Tensor]] = [[] for _ in model.blocks]

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[index].append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(model.blocks)]
    try:
        for rows in tokens_NT.split(batch or len(tokens_NT)):
            model.model(input_ids=rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in found]


def layer_context(
    weight: Tensor, inputs: Tensor | Sequence[Tensor], *, block: int = 0, seed: int = 0
) -> LayerContext:
    """A layer whose statistics, Gram included, are those of `inputs` [tokens, d_in]; its gradients are random."""
    statistics = InputStatistics()
    for part in [inputs] if isinstance(inputs, Tensor) else inputs:
        statistics.add(part, with_gram=True)
    return LayerContext(
        "layer",
        block,
        weight,
        statistics,
        generator(seed, "test"),
        gradients=random_gradients(weight, "loss"),
        block_gradients=random_gradients(weight, "block"),
    )


def random_gradients(weight: Tensor, name: str, num_sequences: int = 5) -> GradientStatistics:
    """Gradients of that many sequences by a weight; the same for the same shape and name."""
    each = torch.randn(num_sequences, *weight.shape, generator=generator(0, "gradients", name))
    return GradientStatistics(each.mean(dim=0), each.square().mean(dim=0), num_sequences)
