"""What every recipe for text that the model writes itself shares: batches, their cache, sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from reprune import RESULTS_VERSION
from reprune.cache import cached_folder
from reprune.calibration.source import Cut, Document, TextContext, TextSource
from reprune.calibration.tokenised import tokenizer_identity
from reprune.errors import ConfigError, RunError, require_positive
from reprune.model.description import adds_bos
from reprune.model.loading import LoadedModel
from reprune.seeding import generator
from reprune.tensor_files import write_tensors

MAX_UNWRITTEN = 200


@dataclass(frozen=True)
class Starts:
    """What the model continues: token ids [texts, tokens], of which the first `num_hidden` are not of the text.

    `document_ids` names the document that each text derives from; a text without is named by its own tokens.
    """

    tokens_BT: Tensor
    num_hidden: int
    document_ids: Sequence[str] = ()


@dataclass(kw_only=True)
class WrittenText(TextSource):
    """Texts sampled to the end-of-text token or `max_new_tokens`, in batches of `batch_size` with a key-value cache.

    Each text is drawn from a stream of its own; the batch is part of the recipe because rounding may move a draw.
    Batches are cached by model, recipe, seed and place, so that interrupted generation goes on with the next one.
    """

    cut: Cut = "pack"
    max_new_tokens: int = 512
    batch_size: int = 32

    endless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)

    @property
    def needs_model(self) -> bool:
        """Always."""
        return True

    @property
    def num_given(self) -> int:
        """How many tokens at the head of a text are not sampled."""
        raise AssertionError("every recipe says what it begins with")

    def temperature_of(self, place: int) -> float:
        """The temperature that the sampled token at `place`, from 0, is drawn at."""
        raise AssertionError("every recipe has a temperature")

    def starts(self, model: LoadedModel, context: TextContext, streams: Sequence[torch.Generator], first: int) -> Starts:  # fmt: skip
        """The beginnings of the texts from number `first` on, one a stream; the model is on its device."""
        raise AssertionError("every recipe begins its texts")

    def check(self, key: str) -> None:
        """ConfigError for windows inside one text that no text is long enough for."""
        longest = self.num_given + self.max_new_tokens
        # A BOS token may take one place of the window.
        if self.cut != "pack" and self.length is not None and self.length - 1 > longest:
            raise ConfigError(
                f"{key}.max_new_tokens",
                f"no text is longer than {longest} tokens, and cut={self.cut} takes windows inside one text",
                value=f"max_new_tokens={self.max_new_tokens}, length={self.length}",
                accepted=f"{self.length - self.num_given} or more",
                hint="raise max_new_tokens, shorten the windows, or cut=pack to join texts",
            )

    def check_tokenizer(self, tokenizer: Any, key: str) -> None:
        """ConfigError for a tokenizer that lacks a token the recipe needs."""

    def documents(self, context: TextContext) -> Iterator[Document]:
        """Texts without end.

        Raises ConfigError where the tokenizer or the model's context does not fit the recipe, RunError for a model that
        writes nothing but the end-of-text token.
        """
        model = context.model
        assert model is not None, "text of the model's own needs the model"
        self.check_tokenizer(context.tokenizer, context.key)
        return self._documents(model, context)

    def _documents(self, model: LoadedModel, context: TextContext) -> Iterator[Document]:
        # Held back until the model writes something: a caller that wants little would take beginnings for its text.
        unwritten: list[Document] = []
        for batch in count():
            for name, tokens in self._batch(model, context, batch):
                document = Document(name, tokens=tokens) if name else Document.of_tokens(tokens)
                if len(tokens) > self.num_given:
                    yield from (held for held in unwritten if held.tokens is not None and len(held.tokens))
                    unwritten = []
                    yield document
                    continue
                unwritten.append(document)
                if len(unwritten) == MAX_UNWRITTEN:
                    raise RunError(
                        f"{context.key}: {model.name} ended {MAX_UNWRITTEN} texts in a row at once, with the end-of-text "
                        f"token {model.tokenizer.eos_token!r}; use another model or another text"
                    )

    def _batch(self, model: LoadedModel, context: TextContext, batch: int) -> list[tuple[str, Tensor]]:
        """The texts of a batch, from the cache where they are there, with the ids of the documents they derive from."""
        key = {
            **self.identity(),
            "results_version": RESULTS_VERSION,
            "model": model.identity,
            "dtype": str(model.plan.dtype),
            "device": model.plan.kind,
            "threads": model.plan.num_threads,
            "tokenizer": tokenizer_identity(model.tokenizer),
            "made_with": [torch.__version__, transformers.__version__],
            "seed": context.seed,
            "part": context.part,
            **({"set": context.set} if context.set else {}),
            "batch": batch,
        }

        def write(folder: Path) -> None:
            write_tensors(folder / "texts.safetensors", self._write(model, context, batch))

        stored = load_file(cached_folder("generated", key, write) / "texts.safetensors")
        return [(name.partition(" ")[2], stored[name]) for name in sorted(stored)]

    @torch.no_grad()
    def _write(self, model: LoadedModel, context: TextContext, batch: int) -> dict[str, Tensor]:
        first = batch * self.batch_size
        streams = [
            generator(context.seed, self.name, context.part, *which(context), first + place)
            for place in range(self.batch_size)
        ]
        with model.holding(model.model):
            starts = self.starts(model, context, streams, first)
            self._check_room(model, starts.tokens_BT.shape[1], context.key)
            sampled = sample(model, starts.tokens_BT, streams, self.temperature_of, self.max_new_tokens)
        texts = [
            torch.cat([start[starts.num_hidden :], torch.tensor(tokens, dtype=torch.long)])
            for start, tokens in zip(starts.tokens_BT, sampled, strict=True)
        ]
        names = starts.document_ids or [""] * len(texts)
        return {
            f"{i:04d} {name}".strip(): text for i, (name, text) in enumerate(zip(names, texts, strict=True))
        }

    def _check_room(self, model: LoadedModel, num_before: int, key: str) -> None:
        room = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        self._check_fits(room, num_before, key)

    def check_room(self, max_length: int | None, tokenizer: Any, key: str) -> None:
        """See TextSource."""
        self._check_fits(max_length, self.num_given + len(head_of(tokenizer)), key)

    def _check_fits(self, room: int | None, num_before: int, key: str) -> None:
        # The last token is drawn but not read.
        if room is not None and num_before + self.max_new_tokens - 1 > room:
            most = room - num_before + 1
            raise ConfigError(
                f"{key}.max_new_tokens", "longer than the model's context", value=self.max_new_tokens,
                accepted=f"at most {most} behind {num_before} tokens", hint=f"{key}.max_new_tokens={most}",
            )  # fmt: skip


def which(context: TextContext) -> list[str]:
    """What the streams of a set beyond the first are named by."""
    return [f"set {context.set}"] if context.set else []


def head_of(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of a text."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def headed(head: list[int], rows: Tensor) -> Tensor:
    """Token ids [texts, tokens] with `head` in front of each."""
    return torch.cat([torch.tensor(head, dtype=torch.long).expand(len(rows), len(head)), rows], dim=1)


@torch.no_grad()
def sample(
    model: LoadedModel,
    starts_BT: Tensor,
    streams: Sequence[torch.Generator],
    temperature_of: Callable[[int], float],
    max_new_tokens: int,
) -> list[list[int]]:
    """What the model writes behind each start, without the end-of-text token.

    Each text's draws come from its own stream. The caller holds the model on its device.
    """
    from transformers import DynamicCache

    end = model.tokenizer.eos_token_id
    cache = DynamicCache(config=model.model.config)
    texts: list[list[int]] = [[] for _ in streams]
    going = [True] * len(texts)
    step = starts_BT
    for place in range(max_new_tokens):
        output = model.model(input_ids=step.to(model.plan.device), past_key_values=cache, use_cache=True)
        odds = torch.softmax(output.logits[:, -1].float().cpu() / temperature_of(place), dim=-1)
        drawn = draw(odds, streams)
        # Ended texts stay in the batch: without their rows, rounding could move the draws of the others.
        for text, token in enumerate(drawn):
            going[text] = going[text] and token != end
            if going[text]:
                texts[text].append(token)
        if not any(going):
            break
        step = torch.tensor(drawn)[:, None]
    return texts


def draw(odds_BV: Tensor, streams: Sequence[torch.Generator]) -> list[int]:
    """A token a row, from the row's own stream: the draws of torch.multinomial, in one pass over all rows.

    The token whose probability divided by an exponential number is largest is distributed as the probabilities.
    Raises RunError for probabilities that are none.
    """
    if not odds_BV.sum().isfinite():
        raise RunError("the model's logits are not finite, so no token can be drawn; use another dtype")
    noise = torch.empty_like(odds_BV)
    for row, stream in zip(noise, streams, strict=True):
        row.exponential_(generator=stream)
    return [int(token) for token in torch.div(odds_BV, noise, out=noise).argmax(dim=-1)]
