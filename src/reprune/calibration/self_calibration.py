"""Source `self_calibration`: text the model writes from its BOS token (Self-calibration, arXiv 2410.17170, §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reprune.calibration.generation import Starts, WrittenText, head_of, headed
from reprune.calibration.source import TextContext
from reprune.errors import ConfigError, require_nonnegative, require_positive
from reprune.model.loading import LoadedModel

FirstToken = Literal["bos", "stop_words"]

STOP_WORDS = tuple(
    """
    a about above after again against all am an and any are as at be because been before being below between both but by
    can could did do does doing down during each few for from further had has have having he her here hers herself him
    himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or other
    our ours ourselves out over own same she should so some such than that the their theirs them themselves then there
    these they this those through to too under until up very was we were what when where which while who whom why will
    with would you your yours yourself yourselves
    """.split()  # noqa: SIM905 (as a list this is two pages)
)


@dataclass(kw_only=True)
class SelfCalibration(WrittenText):
    """Sampling from BOS alone; `cut=pack` joins the texts that end early to windows of full length, as the paper does.

    Sampled token i, from 0, has the temperature t_init + (i/n)(t_fin − t_init) for i ≤ n, and t_fin behind.
    `first_token=stop_words` (the paper's choice for three of its five model families) draws the first token uniformly from those English stop
    words that are one token, with a leading space where that is one token, else without; BOS stands before it where the
    tokenizer adds one. A text that ends before its first token is left out.
    """

    t_init: float = 1.0
    t_fin: float = 1.0
    n: int = 10
    first_token: FirstToken = "bos"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(t_init=self.t_init, t_fin=self.t_fin)
        require_nonnegative(n=self.n)

    @property
    def name(self) -> str:
        """'self_calibration'."""
        return "self_calibration"

    @property
    def num_given(self) -> int:
        """The stop word, if there is one."""
        return int(self.first_token == "stop_words")

    def identity(self) -> dict[str, Any]:
        """The recipe; the model is in the run's hash beside it."""
        return {
            "text": "self_calibration",
            "t_init": self.t_init,
            "t_fin": self.t_fin,
            "n": self.n,
            "first_token": self.first_token,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }

    def check_tokenizer(self, tokenizer: Any, key: str) -> None:
        """ConfigError without a BOS token to begin with, or without a stop word that is one token."""
        if self.first_token == "bos" and tokenizer.bos_token_id is None:
            raise ConfigError(
                f"{key}.first_token", "the tokenizer has no BOS token", value="bos", accepted="stop_words"
            )
        if self.first_token == "stop_words" and not stop_word_tokens(tokenizer):
            raise ConfigError(
                f"{key}.first_token", "no English stop word is one token", value="stop_words", accepted="bos"
            )

    def temperature_of(self, place: int) -> float:
        """From t_init to t_fin over n tokens."""
        return self.t_init + place / self.n * (self.t_fin - self.t_init) if place < self.n else self.t_fin

    def starts(self, model: LoadedModel, context: TextContext, streams: Sequence[torch.Generator], first: int) -> Starts:  # fmt: skip
        """BOS, or [BOS and] a stop word."""
        tokenizer = model.tokenizer
        if self.first_token == "bos":
            return Starts(torch.full((len(streams), 1), tokenizer.bos_token_id), 1)
        head, words = head_of(tokenizer), torch.tensor(stop_word_tokens(tokenizer))
        drawn = torch.stack([words[torch.randint(len(words), (1,), generator=stream)] for stream in streams])
        return Starts(headed(head, drawn), len(head))


def stop_word_tokens(tokenizer: Any) -> list[int]:
    """The token of each stop word that has one, each token once."""
    found = {}
    for word in STOP_WORDS:
        for form in (f" {word}", word):
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] not in tokenizer.all_special_ids:
                found[ids[0]] = word
                break
    return list(found)
