"""Reconstruction by gradient: minimise an objective over the kept weights, masks held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from reprune.errors import RunError
from reprune.model.loading import LoadedModel
from reprune.ranks import ALONE, Ranks
from reprune.reconstruction.masked_lora import MaskedLora
from reprune.reconstruction.objective import Objective
from reprune.reconstruction.technique import Technique
from reprune.reconstruction.trainable import Direct, TrainedBlock, Training


@dataclass
class Course:
    """How a training went: mean loss of each epoch; with a validation text its loss before and after each epoch."""

    epoch_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None

    def told(self) -> dict[str, Any]:
        """As it is recorded; without validation there is nothing to say of it."""
        record: dict[str, Any] = {"epoch_losses": self.epoch_losses}
        if self.validation_losses:
            record |= {"validation_losses": self.validation_losses, "best_epoch": self.best_epoch}
        return record


def train(
    objective: Objective,
    validation: Objective | None,
    blocks: Sequence[TrainedBlock],
    technique: Technique,
    generator: torch.Generator,
    on_step: Callable[[], None],
    place: str,
    ranks: Ranks = ALONE,
) -> Course:
    """Minimise `objective` over the chosen parameters of `blocks`, which are float32 on the device (see in_float32).

    Masked weights stay exactly zero. With `validation`, ends after technique.patience epochs without a lower loss on it
    and leaves the weights of the best epoch, the start being epoch 0. The samples of a step are shared by `ranks`, which
    all make the step. Raises RunError, naming `place`, when the loss is not finite or nothing is trainable.
    """
    from transformers import get_scheduler

    training: Training = Direct(blocks)
    if technique.trainable == "masked_lora":
        training = MaskedLora(blocks, technique.rank, technique.lora_scale, generator)
    if not training.parameters:
        raise RunError(f"{place}: no parameter is trainable with trainable={technique.trainable}")
    optimiser = _optimiser(training.parameters, technique)
    size = technique.batch_size
    total = technique.epochs * -(-len(objective) // size)
    scheduler = get_scheduler(
        technique.lr_schedule,
        optimiser,
        num_warmup_steps=int(technique.warmup * total),
        num_training_steps=total,
    )
    course = Course()
    best = _Best(training, technique.patience)
    if validation is not None:
        best.offer(_mean_loss(validation, size, training, ranks), course)
        if not isfinite(course.validation_losses[0]):
            raise RunError(
                f"{place}: the loss on the validation text {technique.stop_on} is not finite before training"
            )
    for epoch in range(technique.epochs):
        order = torch.randperm(len(objective), generator=generator).tolist()
        sum_of_losses = torch.zeros((), device=training.parameters[0].device)
        for start in range(0, len(order), size):
            samples = order[start : start + size]
            sum_of_losses += _step(objective, samples, training, optimiser, technique, ranks) * len(samples)
            scheduler.step()
            on_step()
        course.epoch_losses.append(sum(ranks.gathered(float(sum_of_losses))) / len(objective))
        if not isfinite(course.epoch_losses[-1]):
            raise RunError(
                f"{place}: the reconstruction loss is not finite in epoch {epoch + 1}; "
                f"lower reconstruction.learning_rate (now {technique.learning_rate:g}) or set clip_norm"
            )
        if validation is not None and best.offer(_mean_loss(validation, size, training, ranks), course):
            break
    if validation is not None:
        best.restore()
    training.finish()
    # Whatever follows has their room.
    optimiser.zero_grad(set_to_none=True)
    return course


def _step(
    objective: Objective,
    samples: Sequence[int],
    training: Training,
    optimiser: torch.optim.Optimizer,
    technique: Technique,
    ranks: Ranks,
) -> Tensor:
    """One step of the optimiser; returns what this process has of the loss without the anchor."""
    optimiser.zero_grad(set_to_none=True)
    loss = _backward(objective, samples, training, technique, ranks)
    sum_gradients(training.parameters, ranks)
    if technique.clip_norm is not None:
        # Only the norm mixes weights, so only here do the gradients of masked weights have to go.
        training.mask_gradients()
        nn.utils.clip_grad_norm_(training.parameters, technique.clip_norm)
    optimiser.step()
    training.hold()
    return loss


def _backward(
    objective: Objective, samples: Sequence[int], training: Training, technique: Technique, ranks: Ranks
) -> Tensor:
    """Gradients of this process's part of the loss over `samples`; the part."""
    own = [samples[place] for place in ranks.share(len(samples))]
    if not own:
        return torch.zeros((), device=training.parameters[0].device)
    device = training.parameters[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=technique.training_dtype == "bfloat16"):
        loss = objective.loss(own, training.weights)
    penalised = loss + technique.anchor * training.distance() if technique.anchor else loss
    part = objective.mass(own) / objective.mass(samples) if ranks.several else 1.0
    torch.autograd.backward(part * penalised if ranks.several else penalised)
    return part * loss.detach()


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Make gradients those of all processes together; what none of them has a gradient of keeps none."""
    if not ranks.several:
        return
    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float32)
    ranks.sum_([there])
    found = [parameter for parameter, count in zip(parameters, there.tolist(), strict=True) if count]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_(parameter.grad for parameter in found if parameter.grad is not None)


@dataclass
class _Best:
    """The parameters with the lowest validation loss so far."""

    training: Training
    patience: int
    _losses: list[float] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)

    def offer(self, loss: float, course: Course) -> bool:
        """Take note of the loss after one more epoch; whether patience is at its end."""
        epoch = len(course.validation_losses)
        course.validation_losses.append(loss)
        if course.best_epoch is None or loss < course.validation_losses[course.best_epoch]:
            course.best_epoch = epoch
            self._kept = [parameter.detach().clone() for parameter in self.training.parameters]
        return epoch - course.best_epoch >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, kept in zip(self.training.parameters, self._kept, strict=True):
            parameter.copy_(kept)


@torch.no_grad()
def _mean_loss(objective: Objective, size: int, training: Training, ranks: Ranks) -> float:
    total = 0.0
    starts = range(0, len(objective), size)
    for batch in ranks.share(len(starts)):
        samples = range(starts[batch], min(starts[batch] + size, len(objective)))
        total += float(objective.loss(samples, training.weights)) * len(samples)
    everywhere: list[float] = ranks.gathered(total)
    return sum(everywhere) / len(objective)


@contextmanager
def in_float32(model: LoadedModel, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hold modules on the device with float32 parameters; afterwards each has its own dtype and none is trainable."""
    with model.holding(*modules):
        parameters = list({id(own): own for module in modules for own in module.parameters()}.values())
        dtypes = [parameter.dtype for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        try:
            yield
        finally:
            for parameter, dtype in zip(parameters, dtypes, strict=True):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(False)
                parameter.grad = None


def _optimiser(parameters: list[nn.Parameter], technique: Technique) -> torch.optim.Optimizer:
    rate, decay = technique.learning_rate, technique.weight_decay
    first, second = technique.betas
    if technique.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=(first, second), weight_decay=decay, fused=True)
    if technique.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=rate, betas=(first, second), weight_decay=decay, fused=True)
    if technique.optimiser == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=rate, alpha=second, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=first, weight_decay=decay)
