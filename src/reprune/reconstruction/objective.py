"""What is minimised: a window's distance to its dense output, or the language-model loss of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from reprune.calibration.source import TextSet
from reprune.engine.activations import Activations
from reprune.errors import ConfigError
from reprune.model.loading import LoadedModel
from reprune.reconstruction.losses import TOKEN_WEIGHTS, uniform, weighted_loss

_NOT_PREDICTED = -100
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

    def mass(self, samples: Sequence[int]) -> float:
        """What the mean over these samples is a quotient by: means over parts of them make up the whole by their masses."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets of a window, a store a text; sequence i of all texts together is one sample."""

    inputs: Sequence[Activations]
    targets: Sequence[Activations]

    def __len__(self) -> int:
        return sum(len(text) for text in self.inputs)

    def batch(self, samples: Sequence[int], model: LoadedModel) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs and targets of some samples, float32, on the device; positions on the host where any begins anew."""
        rows = [self._locate(sample) for sample in samples]
        inputs, targets = _rows(self.inputs, rows), _rows(self.targets, rows)
        positions = _stacked([(self.inputs[text].positions_NT, row) for text, row in rows], inputs.shape[1])
        return inputs.to(model.plan.device).float(), targets.to(model.plan.device).float(), positions

    def target(self, samples: Sequence[int], model: LoadedModel) -> Tensor:
        """The targets of some samples as `batch` gives them."""
        targets = _rows(self.targets, [self._locate(sample) for sample in samples])
        return targets.to(model.plan.device).float()

    def _locate(self, sample: int) -> tuple[int, int]:
        for text, store in enumerate(self.inputs):
            if sample < len(store):
                return text, sample
            sample -= len(store)
        raise AssertionError("sample beyond the last")


def _rows(stores: Sequence[Activations], rows: Sequence[tuple[int, int]]) -> Tensor:
    """Some sequences, each by its store and its number there. Not by torch.stack, which autocast has change dtypes."""
    like = stores[0].states_NTH
    found = like.new_empty((len(rows), *like.shape[1:]))
    for place, (text, row) in enumerate(rows):
        found[place] = stores[text].states_NTH[row]
    return found


def _stacked(rows: Sequence[tuple[Tensor | None, int]], length: int) -> Tensor | None:
    """Positions of rows of several texts; None where each row is one text."""
    if all(positions is None for positions, _ in rows):
        return None
    plain = torch.arange(length)
    return torch.stack([plain if positions is None else positions[row] for positions, row in rows])


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

    def loss(self, samples: Sequence[int], weights: WeightsOf) -> Tensor:
        """See Objective."""
        return weighted_loss(self.loss_name, self.token_weight, *self.outputs(samples, weights))

    def outputs(self, samples: Sequence[int], weights: WeightsOf) -> tuple[Tensor, Tensor]:
        """The window's output and its target, [samples, tokens, hidden] each."""
        hidden, target, positions = self.pairs.batch(samples, self.model)
        for block in self.blocks:
            call = self.model.call(block, len(samples), hidden.shape[1], positions).in_float32()
            hidden = call.run(self.model.blocks[block], hidden, weights=weights(block), until=self.until)
        return hidden, target

    def token_weights(self, target_BTH: Tensor) -> Tensor:
        """w_t of the tokens of some samples, [samples, tokens]."""
        return TOKEN_WEIGHTS[self.token_weight](target_BTH)

    def mass(self, samples: Sequence[int]) -> float:
        """See Objective: tokens, each with its weight."""
        if not samples or self.token_weight == uniform.__name__:
            return float(len(samples))
        return float(self.token_weights(self.pairs.target(samples, self.model)).double().sum())


@dataclass(frozen=True)
class LanguageObjective:
    """Mean next-token cross-entropy of the whole model; the first token of a text is predicted by nothing."""

    model: LoadedModel
    tokens_NT: Tensor
    positions_NT: Tensor | None = None

    @staticmethod
    def of(model: LoadedModel, texts: Sequence[TextSet]) -> LanguageObjective:
        """Over the windows of several texts of one length."""
        tokens_NT = torch.cat([text.tokens_NT for text in texts])
        rows = [(text.positions_NT, row) for text in texts for row in range(len(text.tokens_NT))]
        return LanguageObjective(model, tokens_NT, _stacked(rows, tokens_NT.shape[1]))

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
        positions = None if self.positions_NT is None else self.positions_NT[list(samples)]
        logits = self.model.differentiable_logits(tokens, replaced, positions)
        return next_token_loss(logits, tokens, positions)

    def mass(self, samples: Sequence[int]) -> float:
        """See Objective: tokens that are predicted."""
        if self.positions_NT is None:
            return float(len(samples))
        return float((self.positions_NT[list(samples), 1:] != 0).sum())


def next_token_loss(logits_BTV: Tensor, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
    """Mean next-token cross-entropy, nats; the first token of a text, where positions begin anew, is predicted by nothing."""
    targets = tokens_BT[:, 1:]
    if positions_BT is not None:
        targets = targets.masked_fill(positions_BT[:, 1:].to(targets.device) == 0, _NOT_PREDICTED)
    return nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=_NOT_PREDICTED
    )


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise ConfigError unless all reconstruction texts have windows of one length: a batch mixes them."""
    if len(set(lengths)) > 1:
        raise ConfigError(
            "reconstruction_data", "its texts have windows of several lengths", value=sorted(set(lengths)),
            accepted="one length", hint="set the same length on every part",
        )  # fmt: skip
