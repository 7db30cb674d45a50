"""Source `vocabulary`: tokens drawn uniformly from the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from reprune.calibration.source import Document, TextContext, TextSource


@dataclass(kw_only=True)
class Vocabulary(TextSource):
    """Uniform over the tokens that are not special (arXiv 2410.17170, §4)."""

    endless: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """'vocabulary'."""
        return "vocabulary"

    def identity(self) -> dict[str, Any]:
        """The recipe has no parameters."""
        return {"text": "vocabulary"}

    def documents(self, context: TextContext) -> Iterator[Document]:
        """Documents of exactly one window, without end."""
        ordinary = ordinary_tokens(context.tokenizer)
        while True:
            drawn = torch.randint(len(ordinary), (context.length,), generator=context.generator)
            yield Document.of_tokens(ordinary[drawn])


def ordinary_tokens(tokenizer: Any) -> torch.Tensor:
    """The ids that are not special tokens, ascending, int64."""
    special = set(tokenizer.all_special_ids)
    return torch.tensor([token for token in sorted(tokenizer.get_vocab().values()) if token not in special])
