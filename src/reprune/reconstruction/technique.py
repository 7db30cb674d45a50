"""A reconstruction technique as data: a point in the space of arXiv 2406.15524 and 2510.14444."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from reprune.errors import ConfigError, require_nonnegative, require_option, require_positive

LR_SCHEDULES = ("linear", "cosine", "constant")
"""Those of transformers.get_scheduler that need nothing but the number of steps."""

Chain = Literal["sparse", "dense"]


@dataclass(kw_only=True)
class Technique:
    """window × stride × input chain × target chain × trainable × loss × optimiser.

    x_a enters a window from the pruned chain (`input_chain: sparse`) or the dense one; the target is the dense
    window's output on the pruned chain's input (`target_chain: sparse`, BR) or on the dense chain's (`dense`, GP).
    `trainable: none` or `epochs: 0` leaves what the pruner left. Defaults of the optimiser are the study's: Adam(0.9, 0.95), lr 2e-4 with
    linear decay, no weight decay, batch 8; `clip_norm` bounds the norm of the true gradient.
    """

    window: int = 1
    stride: int = 1
    input_chain: Chain = "sparse"
    target_chain: Chain = "dense"
    trainable: str = "all"
    loss: str = "mse"
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 2e-4
    lr_schedule: str = "linear"
    betas: Sequence[float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        from reprune.reconstruction.losses import LOSSES
        from reprune.reconstruction.trainable import TRAINABLE

        require_positive(
            window=self.window,
            stride=self.stride,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            clip_norm=self.clip_norm,
        )
        require_nonnegative(epochs=self.epochs, weight_decay=self.weight_decay)
        if self.stride > self.window:
            raise ConfigError(
                "stride",
                f"larger than the window of {self.window}: blocks would be left out",
                value=self.stride,
            )
        if not isfinite(self.learning_rate):
            raise ConfigError("learning_rate", "must be a finite number", value=self.learning_rate)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas", "two numbers in [0, 1) are needed", value=list(self.betas))
        require_option("trainable", self.trainable, TRAINABLE)
        require_option("loss", self.loss, LOSSES)
        require_option("lr_schedule", self.lr_schedule, LR_SCHEDULES)

    @property
    def trains(self) -> bool:
        """Whether anything is reconstructed at all."""
        return self.epochs > 0 and self.trainable != "none"
