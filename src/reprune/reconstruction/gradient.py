"""Reconstruction by gradient: fit a window of pruned blocks to its target, masks held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reprune.engine.activations import Activations
from reprune.errors import ConfigError, RunError
from reprune.model.loading import LoadedModel
from reprune.reconstruction.losses import LOSSES
from reprune.reconstruction.technique import Technique
from reprune.reconstruction.trainable import TRAINABLE


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets of a window, a store a text; sequence i of all texts together is one sample."""

    inputs: Sequence[Activations]
    targets: Sequence[Activations]

    def __len__(self) -> int:
        return sum(len(text) for text in self.inputs)

    def batch(self, samples: Sequence[int], model: LoadedModel) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, float32, on the device."""
        rows = [self._locate(sample) for sample in samples]
        inputs = torch.stack([self.inputs[text].states_NTH[row] for text, row in rows])
        targets = torch.stack([self.targets[text].states_NTH[row] for text, row in rows])
        return inputs.to(model.plan.device).float(), targets.to(model.plan.device).float()

    def _locate(self, sample: int) -> tuple[int, int]:
        for text, store in enumerate(self.inputs):
            if sample < len(store):
                return text, sample
            sample -= len(store)
        raise AssertionError("sample beyond the last")


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise ConfigError unless all reconstruction texts have windows of one length: a batch mixes them."""
    if len(set(lengths)) > 1:
        raise ConfigError(
            "reconstruction_data", "its texts have windows of several lengths", value=sorted(set(lengths)),
            accepted="one length", hint="set the same length on every part",
        )  # fmt: skip


def reconstruct(
    model: LoadedModel,
    blocks: range,
    masks: Mapping[int, Mapping[str, Tensor]],
    pairs: Pairs,
    technique: Technique,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> list[float]:
    """Train the kept weights of `blocks` and return the mean loss of each epoch.

    Trains in float32 whatever the model's dtype and rounds once at the end. Masked weights stay exactly zero.
    Raises RunError, naming the blocks, when the loss is not finite.
    """
    from transformers import get_scheduler

    # Recording a call runs a block on the host in the model's dtype, so it comes before the blocks leave either.
    for size in {min(technique.batch_size, len(pairs)), len(pairs) % technique.batch_size} - {0}:
        model.call(blocks.start, size, pairs.inputs[0].length)
    with _in_float32(model, blocks):
        chosen: list[nn.Parameter] = []
        held: list[tuple[nn.Parameter, Tensor]] = []
        for block in blocks:
            linears = model.linears[block]
            trained = TRAINABLE[technique.trainable](model.blocks[block], linears)
            chosen += trained.values()
            for name, keep in masks[block].items():
                parameter = trained.get(linears[name].parameter)
                if parameter is not None:
                    # A bool factor is cast element by element, at ten times the cost.
                    held.append((parameter, keep.to(parameter.device, torch.float32)))
        if not chosen:
            raise RunError(
                f"blocks {_named(blocks)}: no parameter is trainable with trainable={technique.trainable}"
            )
        for parameter in chosen:
            parameter.requires_grad_(True)
        optimiser = _optimiser(chosen, technique)
        size = technique.batch_size
        total = technique.epochs * -(-len(pairs) // size)
        scheduler = get_scheduler(
            technique.lr_schedule, optimiser, num_warmup_steps=0, num_training_steps=total
        )
        loss_of = LOSSES[technique.loss]
        epochs = []
        for epoch in range(technique.epochs):
            order = torch.randperm(len(pairs), generator=generator).tolist()
            sum_of_losses = torch.zeros((), device=model.plan.device)
            for start in range(0, len(order), size):
                samples = order[start : start + size]
                hidden, target = pairs.batch(samples, model)
                for block in blocks:
                    call = model.call(block, len(samples), hidden.shape[1])
                    hidden = call.in_float32().run(model.blocks[block], hidden)
                loss = loss_of(hidden, target)
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                if technique.clip_norm is not None:
                    # Only the norm mixes weights, so only here do the gradients of masked weights have to go.
                    for parameter, keep in held:
                        if parameter.grad is not None:
                            parameter.grad.mul_(keep)
                    nn.utils.clip_grad_norm_(chosen, technique.clip_norm)
                optimiser.step()
                with torch.no_grad():
                    for parameter, keep in held:
                        parameter.mul_(keep)
                scheduler.step()
                sum_of_losses += loss.detach() * len(samples)
                on_step()
            epochs.append(float(sum_of_losses) / len(pairs))
            if not torch.isfinite(sum_of_losses):
                raise RunError(
                    f"blocks {_named(blocks)}: the reconstruction loss is not finite in epoch {epoch + 1}; "
                    f"lower reconstruction.learning_rate (now {technique.learning_rate:g}) or set clip_norm"
                )
        return epochs


@contextmanager
def _in_float32(model: LoadedModel, blocks: range) -> Iterator[None]:
    """Hold blocks on the device in float32; afterwards they are in the model's dtype and nothing is trainable."""
    modules = [model.blocks[block] for block in blocks]
    with model.plan.holding(*modules):
        for module in modules:
            module.float()
        try:
            yield
        finally:
            for module in modules:
                module.to(model.plan.dtype)
                module.requires_grad_(False)
                module.zero_grad(set_to_none=True)


def _optimiser(parameters: list[nn.Parameter], technique: Technique) -> torch.optim.Optimizer:
    rate, decay = technique.learning_rate, technique.weight_decay
    first, second = technique.betas
    if technique.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=(first, second), weight_decay=decay, fused=True)
    if technique.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=rate, betas=(first, second), weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, lr=rate, momentum=first, weight_decay=decay)


def _named(blocks: range) -> str:
    return f"{blocks.start}" if len(blocks) == 1 else f"{blocks.start}–{blocks.stop - 1}"
