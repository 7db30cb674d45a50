"""What is minimised: a window's distance to its dense output, or the language-model loss of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from reprune.engine.activations import Activations
from reprune.errors import ConfigError
from reprune.model.loading import LoadedModel
from reprune.reconstruction.losses import weighted_loss

WeightsOf = Callable[[int], dict[str, Tensor]]
"""Tensors that stand in for a block's own, by the block's number."""


class Objective(Protocol):
    """A loss over some of its samples."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def loss(self, samples: Sequence[int], weights: WeightsOf) -> Tensor:
        """Mean loss over some samples, a scalar."""
        ...


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


@dataclass(frozen=True)
class WindowObjective:
    """Distance of the window's output, or of the output of the module `until` within its one block, to the target."""

    model: LoadedModel
    blocks: range
    pairs: Pairs
    loss_name: str
    token_weight: str
    until: str | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def record_calls(self, batch_size: int) -> None:
        """Record how the blocks are called, which runs on the host in the model's dtype: before training moves them."""
        for size in {min(batch_size, len(self)), len(self) % batch_size} - {0}:
            self.model.call(self.blocks.start, size, self.pairs.inputs[0].length)

    def loss(self, samples: Sequence[int], weights: WeightsOf) -> Tensor:
        """See Objective."""
        hidden, target = self.pairs.batch(samples, self.model)
        for block in self.blocks:
            call = self.model.call(block, len(samples), hidden.shape[1]).in_float32()
            hidden = call.run(self.model.blocks[block], hidden, weights=weights(block), until=self.until)
        return weighted_loss(self.loss_name, self.token_weight, hidden, target)


@dataclass(frozen=True)
class LanguageObjective:
    """Mean next-token cross-entropy of the whole model."""

    model: LoadedModel
    tokens_NT: Tensor

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def loss(self, samples: Sequence[int], weights: WeightsOf) -> Tensor:
        """See Objective."""
        tokens = self.tokens_NT[list(samples)].to(self.model.plan.device)
        replaced = {
            f"{self.model.blocks_path}.{block}.{name}": tensor
            for block in range(len(self.model.blocks))
            for name, tensor in weights(block).items()
        }
        logits = self.model.differentiable_logits(tokens, replaced)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise ConfigError unless all reconstruction texts have windows of one length: a batch mixes them."""
    if len(set(lengths)) > 1:
        raise ConfigError(
            "reconstruction_data", "its texts have windows of several lengths", value=sorted(set(lengths)),
            accepted="one length", hint="set the same length on every part",
        )  # fmt: skip
