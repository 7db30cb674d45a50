"""From documents of token ids to windows: cropped, or packed one behind the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reprune.errors import ConfigError

MAX_SKIPPED = 1000


@dataclass(frozen=True)
class Window:
    """Token ids [length], the documents they come from, how many tokens these have; positions where there are several."""

    tokens: Tensor
    document_ids: tuple[str, ...]
    document_tokens: int
    positions: Tensor | None = None

    def headed(self, head: Tensor) -> Window:
        """With token ids in front."""
        return replace(self, tokens=torch.cat([head, self.tokens]))


def crop_all(documents: list[tuple[str, Tensor]], content: int, chooser: torch.Generator) -> Iterator[Window]:
    """One window of every document long enough, in random order; then a second of those longer, and so on."""
    plans = []
    for place in torch.randperm(len(documents), generator=chooser).tolist():
        name, ids = documents[place]
        count = len(ids) // content
        if count:
            start = int(torch.randint(len(ids) - count * content + 1, (1,), generator=chooser))
            order = torch.randperm(count, generator=chooser).tolist()
            plans.append((name, ids, [start + index * content for index in order]))
    for turn in range(max((len(starts) for _, _, starts in plans), default=0)):
        for name, ids, starts in plans:
            if turn < len(starts):
                yield Window(ids[starts[turn] : starts[turn] + content], (name,), len(ids))


def crop_stream(
    documents: Iterable[tuple[str, Tensor]],
    content: int,
    chooser: torch.Generator | None,
    endless: bool,
    key: str,
) -> Iterator[Window]:
    """One window of every document long enough: at a random place, or without a chooser its first tokens."""
    skipped = 0
    for name, ids in documents:
        if len(ids) < content:
            skipped += 1
            if endless and skipped > MAX_SKIPPED:
                raise ConfigError(
                    f"{key}.length", f"{skipped} documents in a row were shorter than a window", value=content
                )
            continue
        skipped = 0
        start = 0 if chooser is None else int(torch.randint(len(ids) - content + 1, (1,), generator=chooser))
        yield Window(ids[start : start + content], (name,), len(ids))


def shuffled(documents: list[tuple[str, Tensor]], chooser: torch.Generator) -> list[tuple[str, Tensor]]:
    """The documents in random order."""
    return [documents[place] for place in torch.randperm(len(documents), generator=chooser).tolist()]


def end_of_text(tokenizer: Any, key: str) -> Tensor:
    """The id [1] that stands between packed documents; ConfigError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key}.cut", "packing needs an end-of-text token, and the tokenizer has none", value="pack"
        )
    return torch.tensor([tokenizer.eos_token_id])


def pack_apart(
    documents: Iterable[tuple[str, Tensor]], length: int, head: Tensor, end: Tensor
) -> Iterator[Window]:
    """Windows filled with documents, or what is left of them, each with `head` in front and positions of its own.

    An end-of-text token is behind each document; what does not fit goes on in the next window.
    """
    pieces: list[Tensor] = []
    names: dict[str, int] = {}
    room = length
    for name, ids in documents:
        left = torch.cat([ids, end])
        while len(left):
            piece = torch.cat([head, left])[:room]
            left = left[max(0, room - len(head)) :]
            pieces.append(piece)
            names[name] = len(ids)
            room -= len(piece)
            if room == 0:
                positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
                yield Window(torch.cat(pieces), tuple(names), sum(names.values()), positions)
                pieces, names, room = [], {}, length


def pack(documents: Iterable[tuple[str, Tensor]], content: int, end: Tensor) -> Iterator[Window]:
    """Documents one after the other, an end-of-text token behind each, cut every `content` tokens."""
    held: list[tuple[str, Tensor]] = []
    count = 0
    for name, ids in documents:
        ids = torch.cat([ids, end])
        held.append((name, ids))
        count += len(ids)
        while count >= content:
            joined = torch.cat([ids for _, ids in held])
            yield Window(joined[:content], tuple(name for name, _ in held), len(joined))
            count -= content
            held = [(name, joined[content:])] if count else []
