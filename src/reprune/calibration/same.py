"""Source `same`: the mask data's own source."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from reprune.calibration.source import TextSource


@dataclass(kw_only=True)
class Same(TextSource):
    """As reconstruction data: the very windows of the mask data. As a probe: another part of the same source.

    Fields left null are the mask data's.
    """

    num_sequences: int | None = None
    length: int | None = None
    cut: Any = None
    cross_documents: Any = None
    set: Any = None
    selection: Any = None
    band: Any = None

    def _check_choice(self) -> None:
        """Checked when the fields of the mask data are there."""

    def resolve(self, mask_data: TextSource) -> TextSource:
        """The mask data's source with the fields that are set here."""
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(TextSource)
            if getattr(self, field.name) is not None
        }
        return replace(mask_data, **changed)
