"""A model whose embedding and head hold the rows of some token ids only; ids and tokenizer stay what they are.

No module is exchanged, since what a class makes of its rows (Gemma scales them) is its own business: the embedding is
told rows instead of ids, and behind the whole model, where caps and scales of logits are done, the logits of the kept
ids are put in their places among −∞.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reprune.errors import ConfigError, RunError

if TYPE_CHECKING:
    from reprune.model.loading import LoadedModel

PROBED = 6
"""Ids below that stand for any token where only shapes are looked at (LoadedModel.submodules and others): they stay."""

_ROUNDING = 64
_TOKENS = 8
_POSITIONS = 16
"""Tables of positions may be that much longer than the context."""


@dataclass(frozen=True)
class Trimmed:
    """What restoring needs beside the removed rows: which ids are kept, int64 [kept], of how many; the hooks."""

    kept: Tensor
    num_ids: int
    padding_idx: int | None
    handles: tuple[Any, ...]

    @property
    def gone(self) -> Tensor:
        """The removed ids, int64 [removed], ascending."""
        there = torch.ones(self.num_ids, dtype=torch.bool)
        there[self.kept] = False
        return there.nonzero()[:, 0]


def find_vocabulary(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """The embedding and the head of a model or a skeleton, which are one's only use of token ids as far as shapes tell.

    ConfigError, without a key, for a model with other tables by token id.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        found = f"{type(embedding).__name__} and {type(head).__name__}"
        raise ConfigError("", "its embedding and head are no plain tables of rows", value=found)
    num_ids = embedding.weight.shape[0]
    if head.weight.shape[0] != num_ids:
        raise ConfigError(
            "", f"its embedding has {num_ids} rows and its head {head.weight.shape[0]}", accepted="as many"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        if module in (embedding, head):
            continue
        if isinstance(module, nn.Embedding) and longest is not None and module.num_embeddings > longest + _POSITIONS:  # fmt: skip
            raise ConfigError(
                "", "has a second table by token id, whose rows would have to go too", value=path
            )
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            if num_ids in tensor.shape or tensor is embedding.weight or tensor is head.weight:
                raise ConfigError("", "has another tensor with an entry a token id", value=f"{path}.{name}")
    return embedding, head


@torch.no_grad()
def trim(model: LoadedModel, kept: Tensor, tokens_NT: Tensor) -> tuple[LoadedModel, dict[str, Tensor]]:
    """The model with only the rows of `kept` (int64, ascending), and the others: embedding, head, bias [removed, …].

    Of a tied head the rows are the embedding's, and those that went are there once. The model that is given is used up;
    `tokens_NT` are ids that are kept, on which hidden states and logits are checked to be what they were.
    RunError for a model that uses token ids elsewhere.
    """
    embedding, head = find_vocabulary(model.model)
    tokens = tokens_NT[:1, :_TOKENS]
    before, logits = _measured(model, tokens, embedding)
    num_ids = embedding.weight.shape[0]
    row_of_id = torch.full((num_ids,), -1)
    row_of_id[kept] = torch.arange(len(kept))
    gone = (row_of_id < 0).nonzero()[:, 0]
    tied = head.weight is embedding.weight
    removed = {"embedding": embedding.weight[gone]}
    embedding.weight = _frozen(embedding.weight[kept])
    if tied:
        head.weight = embedding.weight
    else:
        removed["head"] = head.weight[gone]
        head.weight = _frozen(head.weight[kept])
    if head.bias is not None:
        removed["bias"] = head.bias[gone]
        head.bias = _frozen(head.bias[kept])
    padding = embedding.padding_idx
    embedding.padding_idx = None if padding is None or row_of_id[padding] < 0 else int(row_of_id[padding])
    embedding.num_embeddings = head.out_features = len(kept)
    # They go to the device and back with what they belong to, and are in no file.
    embedding.register_buffer("row_of_id", row_of_id, persistent=False)
    head.register_buffer("kept_ids", kept, persistent=False)
    handles = (
        embedding.register_forward_pre_hook(_told_rows(model.tokenizer), with_kwargs=True),
        model.model.register_forward_hook(_among_all(head, num_ids)),
    )
    left = replace(model, trimmed=Trimmed(kept, num_ids, padding, handles))
    after, found = _measured(left, tokens, embedding)
    same = torch.isclose(
        found[..., kept], logits[..., kept], rtol=0, atol=_ROUNDING * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    )  # fmt: skip
    if not torch.equal(before, after) or not bool(same.all()):
        raise RunError(f"{model.name}: with these rows alone it computes something else; its vocabulary cannot be trimmed")  # fmt: skip
    return left, removed


@torch.no_grad()
def restore(model: LoadedModel, removed: Mapping[str, Tensor]) -> LoadedModel:
    """The model with all rows, to the bit: those that were kept as they are now, the others from `removed`."""
    trimmed = model.trimmed
    assert trimmed is not None, "nothing was removed"
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for handle in trimmed.handles:
        handle.remove()

    def whole(kept_rows: Tensor, name: str) -> nn.Parameter:
        rows = kept_rows.new_empty(trimmed.num_ids, *kept_rows.shape[1:])
        rows[trimmed.kept] = kept_rows
        rows[trimmed.gone] = removed[name].to(rows)
        return _frozen(rows)

    embedding.weight = whole(embedding.weight, "embedding")
    head.weight = embedding.weight if tied else whole(head.weight, "head")
    if head.bias is not None:
        head.bias = whole(head.bias, "bias")
    del embedding.row_of_id, head.kept_ids
    embedding.padding_idx = trimmed.padding_idx
    embedding.num_embeddings = head.out_features = trimmed.num_ids
    return replace(model, trimmed=None)


def require_kept(model: LoadedModel, ids: Tensor) -> None:
    """RunError where rows of some of these token ids were removed: how many, and which is the first."""
    if model.trimmed is not None:
        row_of_id = model.model.get_input_embeddings().row_of_id
        _require(row_of_id[ids.to(row_of_id.device)], ids, model.tokenizer)


def _require(rows: Tensor, ids: Tensor, tokenizer: Any) -> None:
    missing = ids.to(rows.device)[rows < 0]
    if len(missing):
        first = int(missing.flatten()[0])
        raise RunError(
            f"{len(set(missing.tolist()))} token ids of this text, in {len(missing)} places, have no row since the "
            f"vocabulary was trimmed; the first is {first} ({tokenizer.convert_ids_to_tokens(first)!r}). "
            "Name a text that has them in transform.paths, or set transform.evaluate=restored"
        )


def _told_rows(tokenizer: Any) -> Any:
    def translate(module: Any, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        ids = positional[0] if positional else keywords["input"]
        rows = module.row_of_id[ids]
        _require(rows, ids, tokenizer)
        if positional:
            return (rows, *positional[1:]), keywords
        return positional, {**keywords, "input": rows}

    return translate


def _among_all(head: Any, num_ids: int) -> Any:
    def place(module: nn.Module, positional: Any, output: Any) -> Any:
        logits = output.logits
        wide = logits.new_full((*logits.shape[:-1], num_ids), -torch.inf)
        wide[..., head.kept_ids.to(logits.device)] = logits
        output.logits = wide
        return output

    return place


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _measured(model: LoadedModel, tokens: Tensor, embedding: nn.Module) -> tuple[Tensor, Tensor]:
    """What enters block 0, and the logits. RunError where another table than the embedding is given the token ids."""
    others: list[str] = []

    def look(path: str) -> Any:
        def hook(module: nn.Module, positional: tuple[Any, ...]) -> None:
            given = positional[0] if positional else None
            if isinstance(given, Tensor) and given.shape == tokens.shape and torch.equal(given.cpu(), tokens):
                others.append(path)

        return hook

    tables = [
        (path, module)
        for path, module in model.model.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding
    ]
    handles = [module.register_forward_pre_hook(look(path)) for path, module in tables]
    try:
        states = model.embed(tokens)
        with model.holding(model.model):
            logits = model.logits(tokens).cpu()
    finally:
        for handle in handles:
            handle.remove()
    if others:
        raise RunError(
            f"{model.name}: {others[0]} is a second table by token id; its vocabulary cannot be trimmed"
        )
    return states, logits
