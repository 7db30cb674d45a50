"""Trainable `masked_lora`: low-rank updates under the mask (PERP, arXiv 2312.15230)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reprune.reconstruction.trainable import TrainedBlock


class MaskedLora:
    """W ← W + s · (B A) ⊙ M for every prunable linear, B zero at the start, A uniform in ±1/√(columns).

    B is [rows, rank] and A [rank, columns] of the weight as it is stored; fused experts have one pair each. Only A and
    B are trained; the update is merged into the weight at the end, so that the sparsity stays exact.
    """

    def __init__(
        self, blocks: Sequence[TrainedBlock], rank: int, scale: float, generator: torch.Generator
    ) -> None:
        self.blocks = {block.number: block for block in blocks}
        self.scale = scale
        # Multiplied in every pass, and kept for the way back: no conversion there.
        self.masks = {(block.number, name): mask.float() for block in blocks for name, mask in block.masks.items()}  # fmt: skip
        self.pairs: dict[tuple[int, str], tuple[nn.Parameter, nn.Parameter]] = {}
        for block in blocks:
            for name, weight in block.parameters.items():
                *experts, rows, columns = weight.shape
                bound = columns**-0.5
                drawn = torch.rand(*experts, rank, columns, generator=generator) * 2 * bound - bound
                zeros = torch.zeros(*experts, rows, rank, device=weight.device)
                self.pairs[block.number, name] = (
                    nn.Parameter(zeros),
                    nn.Parameter(drawn.to(weight.device)),
                )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """See Training."""
        return [factor for pair in self.pairs.values() for factor in pair]

    def _update(self, block: int, name: str) -> Tensor:
        up, down = self.pairs[block, name]
        update = self.scale * (up @ down)
        mask = self.masks.get((block, name))
        return update if mask is None else update * mask

    def weights(self, block: int) -> dict[str, Tensor]:
        """See Training."""
        own = self.blocks[block].parameters
        return {name: own[name].detach() + self._update(block, name) for name in own}

    def mask_gradients(self) -> None:
        """See Training: the mask is in the forward pass."""

    def hold(self) -> None:
        """See Training: the mask is in the forward pass."""

    def distance(self) -> Tensor:
        """See Training."""
        return torch.stack([self._update(*key).square().sum() for key in self.pairs]).sum()

    @torch.no_grad()
    def finish(self) -> None:
        """See Training."""
        for number, block in self.blocks.items():
            for name, parameter in block.parameters.items():
                parameter.add_(self._update(number, name))
