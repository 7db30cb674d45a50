"""The texts of a run by role, and the rule that no document and no rare run of tokens has two roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from reprune.calibration.overlap import Hashes, distinct, runs_of, shares_any, without
from reprune.calibration.source import TextSet
from reprune.errors import ConfigError


@dataclass
class Texts:
    """Mask data, reconstruction data (which may share sets with it), validation texts and probes."""

    mask: list[TextSet] = field(default_factory=list)
    reconstruction: list[TextSet] = field(default_factory=list)
    validation: list[TextSet] = field(default_factory=list)
    probes: list[TextSet] = field(default_factory=list)

    def mask_without(self, name: str | None) -> list[TextSet]:
        """The mask data but for the text of this name; None: all of it."""
        return [text for text in self.mask if name is None or text.name != name]

    @property
    def calibration(self) -> list[TextSet]:
        """Mask and reconstruction data, each set once."""
        return list({text.key: text for text in [*self.mask, *self.reconstruction]}.values())

    @property
    def all(self) -> list[TextSet]:
        """Every set once."""
        return [*self.calibration, *self.validation, *self.probes]


def check_roles(
    texts: Texts, evaluation: Mapping[str, TextSet], common: Hashes, size: int, most: float
) -> dict[str, float]:
    """Check that no document has two roles and measure the overlap of calibration with every held-out text.

    `common` are the runs that stand in many documents, `size` the length of a run in tokens. Returns, for each
    held-out text, the share of calibration windows that hold one of its rare runs. Raises ConfigError for a shared
    document, and where that share is more than `most`.
    """
    held_out = {
        **{f"validation.{text.name}": text for text in texts.validation},
        **{f"probes.{text.name}": text for text in texts.probes},
        **{f"evaluation.{name}": text for name, text in evaluation.items()},
    }
    _check_documents(texts, held_out)
    windows = [runs_of(row.numpy(), size) for text in texts.calibration for row in text.tokens_NT]
    shares = {}
    for key, text in held_out.items():
        runs = distinct(np.concatenate([runs_of(row.numpy(), size) for row in text.tokens_NT]))
        rare = without(runs, common)
        shares[key] = sum(shares_any(window, rare) for window in windows) / max(1, len(windows))
        if shares[key] > most:
            raise ConfigError(
                key,
                f"{shares[key]:.1%} of the calibration windows hold a run of {size} tokens of this text",
                value=text.name,
                accepted=f"at most {most:.1%} (max_overlap)",
                hint="choose another text or split, raise max_overlap, or set allow_overlap=true to run all the same (it is recorded)",
            )
    return shares


def _check_documents(texts: Texts, held_out: Mapping[str, TextSet]) -> None:
    owner: dict[str, tuple[str, str]] = {}
    named = [(f"calibration ({text.name})", text) for text in texts.calibration] + list(held_out.items())
    for key, text in named:
        for document in text.document_ids:
            role, first = owner.setdefault(document, (text.role, key))
            if role != text.role:
                raise ConfigError(
                    key,
                    f"document {document} is also used as {role} text, in {first}",
                    value=text.name,
                    accepted="documents with one role each",
                    hint="leave 'split' to its default, or choose another source",
                )
