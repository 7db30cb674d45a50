"""Source `continued`: beginnings of real documents, continued by the model (Beware of calibration data, 2410.17711)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from reprune.calibration.corpora import CorpusSource
from reprune.calibration.generation import Starts, WrittenText, head_of, headed, which
from reprune.calibration.source import TextContext, TextSource
from reprune.errors import ConfigError, require_positive
from reprune.model.loading import LoadedModel
from reprune.seeding import generator


@dataclass(kw_only=True)
class Continued(WrittenText):
    """The first `prefix_tokens` tokens of a document of `prefixes`, then sampling at `temperature`.

    The documents are those of the same part as the text: what calibrates continues calibration documents, a probe those of
    the probe part. A text has the id of the document it continues, so that a document with two roles is found out.
    Once every document has been continued, the next `prefix_tokens` tokens of each are, and so on; when there are no more,
    all over again with new draws. `keep_prefix=false` leaves the document's own tokens out. The paper's filter by
    perplexity is `selection=perplexity`.
    """

    prefixes: Any
    prefix_tokens: int = 8
    keep_prefix: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(prefix_tokens=self.prefix_tokens, temperature=self.temperature)
        if not isinstance(self.prefixes, CorpusSource):
            raise ConfigError(
                "prefixes", "beginnings come from real documents", value=type(self.prefixes).__name__,
                accepted="web, domain, wiki, code, …",
            )  # fmt: skip
        # The windows of that source are not cut, so these would do nothing, or would mix up the parts.
        plain = {field.name: field.default for field in fields(TextSource)}
        for name, default in plain.items():
            value = getattr(self.prefixes, name)
            if value is not None and value != default and list(_listed(value)) != list(_listed(default)):
                raise ConfigError(
                    f"prefixes.{name}", "has no effect: every document of the text's own part is continued",
                    value=value, accepted=f"{default}", hint=f"set {name} of the continued text itself",
                )  # fmt: skip

    @property
    def name(self) -> str:
        """'continued'."""
        return "continued"

    @property
    def num_given(self) -> int:
        """The prefix, where it is kept."""
        return self.prefix_tokens if self.keep_prefix else 0

    def identity(self) -> dict[str, Any]:
        """The recipe and the hash of the documents; the model is in the run's hash beside it."""
        return {
            "text": "continued",
            "prefixes": self.prefixes.identity(),
            "prefix_tokens": self.prefix_tokens,
            "keep_prefix": self.keep_prefix,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }

    def check(self, key: str) -> None:
        """See WrittenText; also the prefixes' own text."""
        super().check(key)
        self.prefixes.check(f"{key}.prefixes")

    def temperature_of(self, place: int) -> float:
        """The same for every token."""
        return self.temperature

    def starts(self, model: LoadedModel, context: TextContext, streams: Sequence[torch.Generator], first: int) -> Starts:  # fmt: skip
        """[BOS and] the prefixes; ConfigError where no document is long enough."""
        head, there = head_of(model.tokenizer), self.listed(context)
        own = [there[(first + place) % len(there)] for place in range(len(streams))]
        hidden = len(head) + (0 if self.keep_prefix else self.prefix_tokens)
        return Starts(headed(head, torch.stack([ids for _, ids in own])), hidden, [name for name, _ in own])

    def listed(self, context: TextContext) -> list[tuple[str, Tensor]]:
        """Every prefix with the id of its document: the first of each, in an order drawn from the seed, then the second …

        Raises ConfigError where there is none.
        """
        size = self.prefix_tokens
        documents = [
            (document.id, context.tokenizer(document.text, add_special_tokens=False)["input_ids"])
            for document in self.prefixes.documents(replace(context, key=f"{context.key}.prefixes"))
        ]
        chooser = generator(context.seed, self.name, context.part, *which(context), "prefixes")
        order = torch.randperm(len(documents), generator=chooser).tolist()
        longest = max((len(ids) for _, ids in documents), default=0)
        found = [
            (documents[place][0], torch.tensor(documents[place][1][start : start + size]))
            for start in range(0, longest - size + 1, size)
            for place in order
            if len(documents[place][1]) >= start + size
        ]
        if not found:
            raise ConfigError(
                f"{context.key}.prefix_tokens", f"no document of the part '{context.part}' has so many tokens",
                value=size, accepted=f"at most {longest}",
            )  # fmt: skip
        return found


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
