"""Source `generated`: text the model writes itself (the study's recipe, arXiv 2406.15524, §4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprune.calibration.generation import Starts, WrittenText, head_of, headed
from reprune.calibration.source import TextContext
from reprune.calibration.vocabulary import ordinary_tokens
from reprune.errors import ConfigError, RunError, did_you_mean, require_nonnegative, require_positive
from reprune.model.loading import LoadedModel

MAX_PREFIX_TRIES = 200


@dataclass(kw_only=True)
class Generated(WrittenText):
    """A random first token, `num_greedy` greedy ones, kept if a detector says `language`, then sampling at `temperature`.

    `language: null` keeps every prefix.
    """

    num_greedy: int = 4
    language: str | None = "en"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(temperature=self.temperature)
        require_nonnegative(num_greedy=self.num_greedy)

    @property
    def name(self) -> str:
        """'generated'."""
        return "generated"

    @property
    def num_given(self) -> int:
        """The random token and the greedy ones."""
        return 1 + self.num_greedy

    def identity(self) -> dict[str, Any]:
        """The recipe; the model is in the run's hash beside it."""
        return {
            "text": "generated",
            "num_greedy": self.num_greedy,
            "language": self.language,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }

    def check(self, key: str) -> None:
        """See WrittenText; also ConfigError for a language that the detector does not know."""
        super().check(key)
        if self.language is not None and self.language not in (known := known_languages()):
            raise ConfigError(
                f"{key}.language", "the detector knows no such language", value=self.language,
                accepted=["null", *known], hint=did_you_mean(self.language, known),
            )  # fmt: skip

    def temperature_of(self, place: int) -> float:
        """The same for every token."""
        return self.temperature

    def starts(self, model: LoadedModel, context: TextContext, streams: Sequence[torch.Generator], first: int) -> Starts:  # fmt: skip
        """[BOS,] a random token and the greedy ones.

        Streams whose prefix ends at once or is not in the language draw again, all of them together.
        Raises RunError where they do so too often.
        """
        tokenizer = model.tokenizer
        ordinary = ordinary_tokens(tokenizer)
        head = head_of(tokenizer)
        found: dict[int, Tensor] = {}
        ended = 0
        for _ in range(MAX_PREFIX_TRIES):
            waiting = [place for place in range(len(streams)) if place not in found]
            if not waiting:
                break
            drawn = [torch.randint(len(ordinary), (1,), generator=streams[place]) for place in waiting]
            ids = headed(head, ordinary[torch.stack(drawn)])
            for _ in range(self.num_greedy):
                following = model.logits(ids)[:, -1].argmax(dim=-1).cpu()
                ids = torch.cat([ids, following[:, None]], dim=1)
            ended = 0
            for place, prefix in zip(waiting, ids, strict=True):
                if tokenizer.eos_token_id in prefix[len(head) :]:
                    ended += 1
                elif self._is_in_language(prefix[len(head) :], tokenizer):
                    found[place] = prefix
        if len(found) < len(streams):
            missing = len(streams) - len(found)
            raise RunError(
                f"{context.key}: of {model.name}, {missing} of {len(streams)} texts found no beginning: "
                f"{MAX_PREFIX_TRIES} prefixes in a row were not '{self.language}' or ended at once (of the last "
                f"{missing}, {ended} ended); set {context.key}.language=null, or use another model"
            )
        return Starts(torch.stack([found[place] for place in range(len(streams))]), len(head))

    def _is_in_language(self, prefix: Tensor, tokenizer: Any) -> bool:
        return self.language is None or detected_language(tokenizer.decode(prefix)) == self.language


def detected_language(text: str) -> str:
    """ISO 639-1 code by py3langid, which is deterministic."""
    from py3langid.langid import classify

    return str(classify(text)[0])


def known_languages() -> list[str]:
    """Every code that `detected_language` may return."""
    from py3langid.langid import rank

    return sorted(str(code) for code, _ in rank(""))
