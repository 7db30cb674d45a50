"""A reconstruction technique as data: a point in the space of arXiv 2406.15524 and 2510.14444."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from reprune.errors import ConfigError, require_nonnegative, require_option, require_positive
from reprune.reconstruction.layerwise import Layerwise

LR_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
"""Those of transformers.get_scheduler that need nothing but the number of steps."""

POLYNOMIAL_END = 1e-7
"""The last learning rate of transformers' polynomial schedule."""

LANGUAGE = "cross_entropy"
"""The loss that needs the whole model: next-token cross-entropy instead of a distance to the dense output."""

Chain = Literal["sparse", "dense"]


@dataclass(kw_only=True)
class Technique:
    """granularity × window × stride × input chain × target chain × trainable × loss × optimiser.

    Where from: `input_chain` says whether x_a enters a window from the pruned chain or the dense one; the target is the
    dense window's output on the pruned chain's input (`target_chain: sparse`, BR) or on the dense chain's (`dense`,
    GP). `statistics_chain` says which chain the pruner's statistics are of, `within_block` whether all layers of a
    block are pruned on statistics of the dense block (`together`, as the reference codes do) or each group of layers
    on those of the groups pruned before it (`sequential`).

    What is fitted: `layerwise` fits every layer right after it is pruned (its least squares, or its bias). Then `window` blocks from
    every `stride`-th on (null: the whole model), or with `granularity: submodule` the output of attention and MLP
    before the residual add, are trained by gradient. `trainable: none` or `epochs: 0` leaves that out.

    Loss per token weighted by `token_weight`, plus `anchor` · ‖θ − θ₀‖², θ₀ what the pruner left. With `stop_on`, the
    name of a validation text, the weights of the epoch with the lowest loss on it are kept (epoch 0, the start,
    counts), and training ends after `patience` epochs without a lower one.

    Defaults of the optimiser are the study's: Adam(0.9, 0.95), lr 2e-4 with linear decay, no weight decay, batch 8;
    `clip_norm` bounds
    the norm of the true gradient; with `sgd` the first of `betas` is its momentum, with `rmsprop` the second its decay of
    squares. `rank` and `lora_scale` belong to `trainable: masked_lora`. With `training_dtype: bfloat16` the products of
    training steps are of bfloat16 (autocast); weights, gradients and moments stay float32.

    `last_layer_iterations` steps of least squares of a window's last layer follow its training (see last_layer.py).
    """

    granularity: Literal["block", "submodule"] = "block"
    window: int | None = 1
    stride: int | None = 1
    input_chain: Chain = "sparse"
    target_chain: Chain = "dense"
    statistics_chain: Chain = "sparse"
    within_block: Literal["together", "sequential"] = "together"
    layerwise: Layerwise | None = None
    trainable: str = "all"
    rank: int = 16
    lora_scale: float = 2.0
    loss: str = "mse"
    token_weight: str = "uniform"
    anchor: float = 0.0
    stop_on: str | None = None
    patience: int = 2
    optimiser: Literal["adamw", "adam", "rmsprop", "sgd"] = "adamw"
    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 2e-4
    lr_schedule: str = "linear"
    warmup: float = 0.0
    betas: Sequence[float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    training_dtype: Literal["float32", "bfloat16"] = "float32"
    last_layer_iterations: int = 0

    def __post_init__(self) -> None:
        from reprune.reconstruction.losses import LOSSES, TOKEN_WEIGHTS
        from reprune.reconstruction.trainable import TRAINABLE

        require_positive(
            window=self.window,
            stride=self.stride,
            rank=self.rank,
            patience=self.patience,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            clip_norm=self.clip_norm,
        )
        require_nonnegative(
            epochs=self.epochs,
            weight_decay=self.weight_decay,
            anchor=self.anchor,
            last_layer_iterations=self.last_layer_iterations,
        )
        for key in ("learning_rate", "anchor", "weight_decay", "lora_scale"):
            if not isfinite(getattr(self, key)):
                raise ConfigError(key, "must be a finite number", value=getattr(self, key))
        if not 0 <= self.warmup < 1:
            raise ConfigError("warmup", "outside its range", value=self.warmup, accepted="0 ≤ warmup < 1, a share of the steps")  # fmt: skip
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas", "two numbers in [0, 1) are needed", value=list(self.betas))
        require_option("trainable", self.trainable, TRAINABLE)
        require_option("loss", self.loss, [*LOSSES, LANGUAGE])
        require_option("token_weight", self.token_weight, TOKEN_WEIGHTS)
        require_option("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if (self.window is None) != (self.stride is None):
            raise ConfigError(
                "stride",
                "null goes with window=null: one window over the whole model",
                value=f"window={self.window}, stride={self.stride}",
                hint="set both to null, or neither",
            )
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ConfigError(
                "stride",
                f"larger than the window of {self.window}: blocks would be left out",
                value=self.stride,
            )
        if self.lr_schedule == "constant" and self.warmup:
            raise ConfigError(
                "warmup",
                "a constant learning rate has no warmup",
                value=self.warmup,
                accepted="0 with lr_schedule=constant",
                hint="lr_schedule=constant_with_warmup",
            )
        if self.lr_schedule == "polynomial" and not self.learning_rate > POLYNOMIAL_END:
            raise ConfigError(
                "learning_rate",
                f"a polynomial schedule ends at {POLYNOMIAL_END:g}, below which it cannot begin",
                value=self.learning_rate,
            )
        if self.layerwise is not None and not (
            self.layerwise.paired or self.trains or self.target_chain == "sparse"
        ):
            raise ConfigError(
                "target_chain",
                "the layer-wise fit makes up for what the layer itself gave, on its own inputs",
                value=self.target_chain,
                accepted="sparse with this `layerwise`",
            )
        if self.anchor and self.window != self.stride:
            raise ConfigError(
                "anchor",
                "windows that overlap train a block again, from weights that are no longer the pruner's",
                value=f"anchor={self.anchor:g}, window={self.window}, stride={self.stride}",
                accepted="stride equal to window, or anchor=0",
            )
        if self.granularity == "submodule" and self.window != 1:
            raise ConfigError(
                "window",
                "attention and MLP are fitted block by block",
                value=self.window,
                accepted="1 with granularity=submodule",
            )
        if self.loss == LANGUAGE and self.window is not None:
            raise ConfigError(
                "loss",
                "the language-model loss needs the whole model in one window",
                value=self.loss,
                accepted=f"{LANGUAGE} with window=null stride=null, or another loss",
            )
        if self.loss == LANGUAGE and (self.input_chain == "dense" or self.token_weight != "uniform"):
            raise ConfigError(
                "loss",
                "the language-model loss reads tokens, not a chain of activations",
                value=f"loss={self.loss}, input_chain={self.input_chain}, token_weight={self.token_weight}",
                accepted="input_chain=sparse, token_weight=uniform",
            )

        if self.last_layer_iterations:
            self._check_last_layer()

    def _check_last_layer(self) -> None:
        barred = {
            "nothing is trained before it": not self.trains,
            "least squares know no other loss": self.loss != "mse",
            "it moves the weights away from what is kept near": self.anchor > 0,
            "it would follow the epoch that the validation text chose": self.stop_on is not None,
            "it changes the weights of a layer": self.trainable not in ("all", "linears"),
            "it is of whole blocks": self.granularity != "block",
        }
        reason = next((words for words, holds in barred.items() if holds), None)
        if reason is not None:
            raise ConfigError(
                "last_layer_iterations",
                reason,
                value=f"{self.last_layer_iterations} with granularity={self.granularity}, trainable={self.trainable}, "
                f"epochs={self.epochs}, loss={self.loss}, anchor={self.anchor:g}, stop_on={self.stop_on}",
                accepted="0, or granularity=block, trainable=all or linears, epochs of 1 or more, loss=mse, anchor=0, stop_on=null",
            )

    @property
    def trains(self) -> bool:
        """Whether anything is trained by gradient."""
        return self.epochs > 0 and self.trainable != "none"

    @property
    def independent_windows(self) -> bool:
        """Whether a window of whole blocks reads nothing that another left: all it sees is dense, and no block is in two of them."""
        chains = {self.input_chain, self.target_chain, self.statistics_chain}
        whole = self.window is None or self.granularity == "submodule"
        apart = self.window == self.stride and self.within_block == "together"
        return chains == {"dense"} and apart and not whole

    @property
    def writes_biases(self) -> bool:
        """Whether every layer that is pruned has to have a bias."""
        return self.layerwise is not None and self.layerwise.writes_bias

    @property
    def needs_dense_weights(self) -> bool:
        """Whether dense weights of a block are read after the block was pruned."""
        own_targets = self.target_chain == "sparse" or self.granularity == "submodule"
        return self.layerwise is not None or (self.trains and own_targets and self.loss != LANGUAGE)

    def solves_on_dense_inputs(self, number: int) -> bool:
        """Whether the layers that are solved in round `number` see what they see in the dense chain: the block is dense."""
        return self.input_chain == "dense" and self.within_block == "together" and number == 0
