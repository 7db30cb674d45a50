"""What a model writes behind prompts: greedy or drawn, in batches with a key-value cache, with its own likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reprune.calibration.generation import draw
from reprune.errors import ConfigError, RunError
from reprune.evaluation.batches import in_batches
from reprune.model.loading import LoadedModel

Streams = Callable[[int], torch.Generator]


@dataclass(frozen=True)
class Written:
    """One continuation: its token ids without the end-of-text token, whether that came, its summed loss in nats.

    The loss is of `num_choices` tokens: those of the text, and the end-of-text token where it came.
    """

    tokens: list[int]
    ended: bool
    loss: float

    @property
    def num_choices(self) -> int:
        """How many tokens the model chose."""
        return len(self.tokens) + self.ended


@dataclass
class _Choosing:
    """A transformers LogitsProcessor that chooses: the most likely token, or one drawn from each row's own stream.

    Every other token is made impossible, so that the library's greedy loop takes the choice; what the choice cost under
    the model's own distribution (temperature 1) is kept, float64 [batch] a step.
    """

    streams: Sequence[torch.Generator] | None
    temperature: float
    losses: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [batch, vocabulary]: 0 for the choice, −∞ elsewhere."""
        logits = scores.float()
        if not logits.logsumexp(dim=-1).isfinite().all():
            raise RunError("the model's logits are not finite, so no token can be chosen; use another dtype")
        if self.streams is None:
            chosen = logits.argmax(dim=-1)
        else:
            odds = torch.softmax(logits.cpu() / self.temperature, dim=-1)
            chosen = torch.tensor(draw(odds, self.streams), device=scores.device)
        odds_of = torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0]
        self.losses.append(-odds_of.double().cpu())
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def write(
    model: LoadedModel,
    prompts: Sequence[Tensor],
    num_tokens: int,
    batch_size: int,
    notes: list[str],
    what: str,
    *,
    stream_of: Streams | None = None,
    temperature: float = 1.0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Written]:
    """What the model writes behind each prompt (token ids [tokens]), to the end-of-text token or `num_tokens`.

    Greedy, or with `stream_of` drawn at `temperature`, prompt i from its stream i: batches and their order change no
    draw beyond rounding. Prompts of different lengths are padded on the left and masked. `on_progress` hears how many are
    done. A batch that does not fit is halved; RunError as in `in_batches`. The caller holds the model on its device.
    """
    places = torch.arange(len(prompts))[:, None]

    def run(which_B1: Tensor) -> list[Written]:
        which = which_B1[:, 0].tolist()
        streams = None if stream_of is None else [stream_of(place) for place in which]
        return _batch(model, [prompts[place] for place in which], num_tokens, _Choosing(streams, temperature))

    found: list[Written] = []
    for where, made in in_batches(places, batch_size, run, notes, what):
        found += made
        on_progress(where.stop)
    return found


@torch.no_grad()
def _batch(
    model: LoadedModel, prompts: Sequence[Tensor], num_tokens: int, choosing: _Choosing
) -> list[Written]:
    from transformers import GenerationConfig, LogitsProcessorList

    end = model.tokenizer.eos_token_id
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), end)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    device = model.plan.device
    # What a checkpoint's generation config adds, a repetition penalty above all, would hide what is measured here.
    own: Any = model.model.generation_config
    model.model.generation_config = GenerationConfig()
    try:
        out = model.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=num_tokens, eos_token_id=end, pad_token_id=end
            ),
            logits_processor=LogitsProcessorList([choosing]),
        )
    finally:
        model.model.generation_config = own
    written = out[:, longest:].cpu()
    losses_BT = torch.stack(choosing.losses, dim=1)
    found = []
    for row, losses in zip(written.tolist(), losses_BT, strict=True):
        ended = end in row
        tokens = row[: row.index(end)] if ended else row
        found.append(Written(tokens, ended, float(losses[: len(tokens) + ended].sum())))
    return found


def check_tokenizer(tokenizer: Any, key: str) -> None:
    """ConfigError for a tokenizer without an end-of-text token, by which writing ends and prompts are padded."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(key, "writing needs an end-of-text token, and the tokenizer has none")


def check_room(num_before: int, num_tokens: int, longest: int, key: str) -> None:
    """ConfigError where `num_tokens` behind `num_before` are more than a context of `longest` tokens holds."""
    # The last token is chosen but not read.
    if num_before + num_tokens - 1 > longest:
        most = longest - num_before + 1
        raise ConfigError(
            f"{key}.num_tokens", "longer than the model's context", value=num_tokens,
            accepted=f"at most {max(0, most)} behind {num_before} tokens",
        )  # fmt: skip


def check_fits(model: LoadedModel, num_before: int, num_tokens: int) -> None:
    """As `check_room`, of a loaded model; RunError."""
    longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and num_before + num_tokens - 1 > longest:
        raise RunError(
            f"{num_tokens} tokens behind {num_before} are longer than the context of {model.name}, {longest} tokens"
        )


class _AsTheyAre:
    """A tokenizer for rouge_score that takes what is between blanks: token ids, of whatever language."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


@lru_cache(maxsize=1)
def _rouge_l() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_AsTheyAre())


def tokens_rouge_l(written: Sequence[int], other: Sequence[int]) -> float:
    """ROUGE-L F1 of token ids (longest common subsequence; Lin 2004); 1 where both are empty."""
    if not written and not other:
        return 1.0
    texts = [" ".join(map(str, ids)) for ids in (other, written)]
    return float(_rouge_l().score(*texts)["rougeL"].fmeasure)
