"""Source `generated`: text the model writes itself (the study's recipe, arXiv 2406.15524, §4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from reprune import RESULTS_VERSION
from reprune.cache import cached_folder
from reprune.calibration.source import Document, TextContext, TextSource
from reprune.calibration.splits import tokenizer_identity
from reprune.calibration.vocabulary import ordinary_tokens
from reprune.errors import RunError, require_nonnegative, require_positive
from reprune.files import write_tensors
from reprune.model.loading import LoadedModel, adds_bos
from reprune.seeding import generator

MAX_PREFIX_TRIES = 200


@dataclass(kw_only=True)
class Generated(TextSource):
    """A random first token, `num_greedy` greedy ones, kept if a detector says `language`, then sampling.

    Sampling at `temperature` goes on to the end-of-text token or `max_new_tokens`. Texts are drawn in batches of
    `batch_size`, each text from a stream of its own; the batch is part of the recipe because rounding may move a draw.
    `language: null` keeps every prefix.
    """

    cut: Literal["crop", "pack"] = "pack"
    num_greedy: int = 4
    language: str | None = "en"
    temperature: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 16

    needs_model: ClassVar[bool] = True
    endless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            temperature=self.temperature, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        require_nonnegative(num_greedy=self.num_greedy)

    @property
    def name(self) -> str:
        """'generated'."""
        return "generated"

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

    def documents(self, context: TextContext) -> Iterator[Document]:
        """Generated texts without end, a batch at a time, each batch cached by model, recipe, seed and place."""
        model = context.model
        assert model is not None, "generated text needs the model"
        batch = 0
        while True:
            for tokens in self._batch(model, context, batch):
                yield Document.of_tokens(tokens)
            batch += 1

    def _batch(self, model: LoadedModel, context: TextContext, batch: int) -> list[Tensor]:
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
            "batch": batch,
        }

        def write(folder: Any) -> None:
            texts = self._generate(model, context, batch)
            write_tensors(folder / "texts.safetensors", {f"{i:04d}": text for i, text in enumerate(texts)})

        stored = load_file(cached_folder("generated", key, write) / "texts.safetensors")
        return [stored[name] for name in sorted(stored)]

    @torch.no_grad()
    def _generate(self, model: LoadedModel, context: TextContext, batch: int) -> list[Tensor]:
        places = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        streams = [generator(context.seed, "generated", context.part, place) for place in places]
        with model.plan.holding(model.model):
            prefixes = self._prefixes(model, streams)
            return self._sample(model, prefixes, streams)

    def _prefixes(self, model: LoadedModel, streams: list[torch.Generator]) -> Tensor:
        """A prefix a stream, int64 [texts, prefix]: [BOS,] a random token and the greedy ones.

        Streams whose prefix ends at once or is not in the language draw again, all of them together.
        """
        tokenizer = model.tokenizer
        ordinary = ordinary_tokens(tokenizer)
        head = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        found: dict[int, Tensor] = {}
        for _ in range(MAX_PREFIX_TRIES):
            waiting = [place for place in range(len(streams)) if place not in found]
            if not waiting:
                break
            drawn = [torch.randint(len(ordinary), (1,), generator=streams[place]) for place in waiting]
            ids = torch.stack(
                [torch.cat([torch.tensor(head, dtype=torch.long), ordinary[one]]) for one in drawn]
            )
            for _ in range(self.num_greedy):
                following = model.logits(ids)[:, -1].argmax(dim=-1).cpu()
                ids = torch.cat([ids, following[:, None]], dim=1)
            for place, prefix in zip(waiting, ids, strict=True):
                if self._accepts(prefix[len(head) :], tokenizer):
                    found[place] = prefix
        if len(found) < len(streams):
            raise RunError(
                f"{MAX_PREFIX_TRIES} prefixes in a row were not '{self.language}' or ended at once; "
                "set language=null on the generated source, or use another model"
            )
        return torch.stack([found[place] for place in range(len(streams))])

    def _accepts(self, prefix: Tensor, tokenizer: Any) -> bool:
        if tokenizer.eos_token_id in prefix:
            return False
        return self.language is None or detected_language(tokenizer.decode(prefix)) == self.language

    def _sample(self, model: LoadedModel, prefixes: Tensor, streams: list[torch.Generator]) -> list[Tensor]:
        """Continue each prefix by sampling with a key-value cache; returns the texts without BOS and end-of-text."""
        from transformers import DynamicCache

        tokenizer, plan = model.tokenizer, model.plan
        cache = DynamicCache(config=model.model.config)
        texts = [prefix.tolist() for prefix in prefixes]
        going = [True] * len(texts)
        step = prefixes
        for _ in range(self.max_new_tokens):
            output = model.model(input_ids=step.to(plan.device), past_key_values=cache, use_cache=True)
            odds = torch.softmax(output.logits[:, -1].float().cpu() / self.temperature, dim=-1)
            drawn = [
                int(torch.multinomial(row, 1, generator=stream))
                for row, stream in zip(odds, streams, strict=True)
            ]
            for place, token in enumerate(drawn):
                going[place] = going[place] and token != tokenizer.eos_token_id
                if going[place]:
                    texts[place].append(token)
            if not any(going):
                break
            step = torch.tensor(drawn)[:, None]
        bos = tokenizer.bos_token_id
        return [torch.tensor(text[1:] if text[0] == bos else text) for text in texts]


def detected_language(text: str) -> str:
    """ISO 639-1 code by py3langid, which is deterministic."""
    from py3langid.langid import classify

    return str(classify(text)[0])
