"""The one way from documents to windows, for every source: crop or pack → set and selection → int64 [sequences, length]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from reprune.calibration.cutting import Window, crop_all, crop_stream, end_of_text, pack, pack_apart, shuffled
from reprune.calibration.source import Bos, Document, Part, Role, TextContext, TextSet, TextSource
from reprune.calibration.tokenised import token_ids
from reprune.errors import ConfigError
from reprune.files import sha256_of_json
from reprune.model.description import adds_bos
from reprune.model.likelihood import row_losses
from reprune.model.loading import LoadedModel
from reprune.seeding import generator


def resolve_bos(bos: Bos | None, tokenizer: Any, key: str) -> Bos:
    """The BOS setting, null resolved by what the tokenizer does.

    Raises ConfigError where each window shall begin with a BOS that the tokenizer does not have.
    """
    if bos is None:
        return "each_window" if adds_bos(tokenizer) else "as_tokenised"
    if bos == "each_window" and tokenizer.bos_token_id is None:
        raise ConfigError(f"{key}.bos", "the tokenizer has no BOS token", value=bos, accepted="as_tokenised")
    return bos


def cut_windows(
    source: TextSource,
    *,
    role: Role,
    tokenizer: Any,
    model: LoadedModel | None,
    seed: int,
    key: str,
    name: str = "",
) -> TextSet:
    """`num_sequences` windows of `length` tokens from a source, the same for the same seed whatever ran before.

    A larger `num_sequences` keeps the windows of a smaller one and adds to them.
    Raises ConfigError, with the counts, when the text is too short.
    """
    part: Part = source.split or role
    bos = resolve_bos(source.bos, tokenizer, key)
    length = source.length
    stream_name = ["text", sha256_of_json(source.identity()), part, length, bos, source.cut]
    if source.endless and source.set:
        stream_name.append(f"set {source.set}")
    context = TextContext(
        tokenizer=tokenizer,
        model=model,
        part=part,
        length=length or 0,
        generator=generator(seed, *stream_name),
        seed=seed,
        key=key,
        set=source.set,
    )
    documents = source.documents(context)
    description = {
        "name": source.name,
        "part": part,
        "cut": source.cut,
        "bos": bos,
        **source.chosen,
        **source.identity(),
    }
    if source.exact:
        exact = list(documents)
        rows = torch.stack([_ids(document, tokenizer, bos) for document in exact])
        ids = tuple(dict.fromkeys(document.id for document in exact))
        positions = _positions(rows, [document.positions for document in exact])
        return TextSet(name or source.name, role, rows, ids, description, bos, positions)
    if length is None:
        raise ConfigError(f"{key}.length", "has to be a number for this source", accepted="2 or more")
    chooser = generator(seed, *stream_name, "windows")
    content = length - 1 if bos == "each_window" else length
    if content < 1:
        raise ConfigError(
            f"{key}.length", "leaves no room for a token beside BOS", value=length, accepted="2 or more"
        )
    if source.cut == "pack" and not source.endless:
        # Documents come in the order of their hashes; the seed decides which are taken.
        listed = list(documents)
        documents = [listed[place] for place in torch.randperm(len(listed), generator=chooser).tolist()]
    tokenised = ((document.id, _ids(document, tokenizer, bos)) for document in documents)
    head = torch.tensor([tokenizer.bos_token_id] if content < length else [], dtype=torch.long)
    if source.cut == "pack":
        end = end_of_text(tokenizer, key)
        made: Iterator[Window] = (
            pack_apart(tokenised, length, head, end) if source.keeps_apart else pack(tokenised, content, end)
        )
    elif source.endless or source.cut == "first":
        listed_first = tokenised if source.endless else shuffled(list(tokenised), chooser)
        made = crop_stream(
            listed_first, content, chooser if source.cut == "crop" else None, source.endless, key
        )
    else:
        made = crop_all(list(tokenised), content, chooser)
    if not source.keeps_apart:
        made = (window.headed(head) for window in made)
    windows, there = select(source, made, model)
    wanted = source.num_sequences
    if not windows or (wanted is not None and len(windows) < wanted):
        raise _too_short(source, there, content, tokenizer, context, key)
    rows, positions = _rows(windows)
    ids = tuple(dict.fromkeys(document for window in windows for document in window.document_ids))
    return TextSet(name or source.name, role, rows, ids, description, bos, positions)


def _rows(windows: Sequence[Window]) -> tuple[Tensor, Tensor | None]:
    rows = torch.stack([window.tokens for window in windows])
    return rows, _positions(rows, [window.positions for window in windows])


def _positions(rows: Tensor, given: Sequence[Tensor | None]) -> Tensor | None:
    """Positions of every row; None where no row holds a second text."""
    plain = torch.arange(rows.shape[1])
    positions = torch.stack([plain if one is None else one for one in given])
    return None if torch.equal(positions, plain.expand_as(positions)) else positions


def _ids(document: Document, tokenizer: Any, bos: Bos) -> Tensor:
    if document.tokens is not None:
        return document.tokens
    assert document.text is not None
    if document.corpus is not None:
        return token_ids(document.corpus, tokenizer, bos == "as_tokenised")[document.text]
    encoded = tokenizer(document.text, add_special_tokens=bos == "as_tokenised")["input_ids"]
    return torch.tensor(encoded, dtype=torch.long)


def select(source: TextSource, made: Iterator[Window], model: LoadedModel | None) -> tuple[list[Window], int]:
    """The windows of the source's set, and how many there were to choose from.

    A set is a slice of the windows in the order that the selection gives them, so that sets are disjoint; the sets of an
    endless source come from streams of their own.
    """
    wanted = source.num_sequences
    if wanted is None:
        windows = list(made)
        return windows, len(windows)
    skip = 0 if source.endless else source.set * wanted
    if source.selection == "random":
        windows = list(islice(made, skip + wanted))
        return windows[skip:], len(windows)
    pool = list(islice(made, source.pool))
    if source.selection == "longest":
        ranked = sorted(pool, key=lambda window: -window.document_tokens)
    else:
        assert model is not None, "perplexity needs the model"
        losses = row_losses(model, *_rows(pool)) if pool else torch.zeros(0)
        low, high = (int(share * len(pool) + 0.5) for share in source.band)
        inside = set(losses.argsort(stable=True)[low:high].tolist())
        ranked = [window for place, window in enumerate(pool) if place in inside]
    return ranked[skip : skip + wanted], len(ranked)


def _too_short(
    source: TextSource,
    found: int,
    content: int,
    tokenizer: Any,
    context: TextContext,
    key: str,
) -> ConfigError:
    """`found` windows were there to choose from."""
    wanted = source.num_sequences or 1
    if source.endless:
        return ConfigError(
            f"{key}.pool", f"{wanted} windows are asked for, the selection leaves {found}", value=source.pool,
            hint="raise pool, or widen band",
        )  # fmt: skip
    lengths = [len(_ids(document, tokenizer, "as_tokenised")) for document in source.documents(context)]
    left = "" if source.selection == "random" else f" after the selection by {source.selection}"
    asked = f"{wanted} windows of {content} tokens are asked for"
    if source.set:
        asked = f"set {source.set} is asked for, of {wanted} windows of {content} tokens each"
        left += f", enough for {found // wanted} sets (from 0)"
    return ConfigError(
        f"{key}.set" if source.set else f"{key}.num_sequences",
        f"{asked}; this text has {found}{left}",
        value=f"{source.name}, part '{context.part}': {len(lengths)} documents, {sum(lengths):,} tokens, "
        f"the longest {max(lengths, default=0):,}",
        hint="ask for a set below that, fewer or shorter sequences, cut=pack, or more text"
        if source.set
        else f"ask for at most {found} sequences, shorter ones, or more text",
    )
