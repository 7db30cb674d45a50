"""LoadedModel: model, tokenizer, blocks and device plan in one object; nothing else knows an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reprune.errors import ConfigError, RunError
from reprune.model.blocks import BlockCall, find_blocks, record_calls, same_calls
from reprune.model.checkpoint import ModelSource
from reprune.model.device import DevicePlan
from reprune.model.linears import LinearView, linears_of
from reprune.model.submodules import Submodule, find_submodules

_TRACED_TOKENS = 4


@dataclass
class LoadedModel:
    """A causal language model in host memory, its blocks, its tokenizer and where it computes."""

    name: str
    model: Any
    tokenizer: Any
    blocks: nn.ModuleList
    plan: DevicePlan
    identity: dict[str, Any]
    _calls: dict[tuple[int, int], list[BlockCall]] = field(default_factory=dict)
    _submodules: dict[int, list[Submodule]] = field(default_factory=dict)

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        assert isinstance(base, nn.Module)
        return base

    @cached_property
    def linears(self) -> list[dict[str, LinearView]]:
        """The prunable linears of each block, by name within the block."""
        return [linears_of(block) for block in self.blocks]

    def submodules(self, block: int) -> list[Submodule]:
        """Attention, MLP or whatever a block adds to its residual stream, in the order in which they are computed."""
        if block not in self._submodules:
            # Any tokens will do: only what is called with what is looked at.
            hidden = self.embed(torch.zeros(1, _TRACED_TOKENS, dtype=torch.long))
            call = self.call(block, 1, _TRACED_TOKENS)
            with self.plan.holding(self.blocks[block]):
                self._submodules[block] = find_submodules(
                    self.blocks[block], self.linears[block], call, hidden.to(self.plan.device)
                )
        return self._submodules[block]

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What enters block 0 for token ids [batch, tokens]: [batch, tokens, hidden], on the host."""
        hidden, calls = record_calls(self.model, self.base, self.blocks, tokens_BT)
        known = self._calls.setdefault((tokens_BT.shape[0], tokens_BT.shape[1]), calls)
        if not same_calls(known, calls):
            raise RunError(
                f"{self.name}: the arguments of its blocks depend on the tokens, which block-by-block replay "
                "cannot give them; this model is not supported"
            )
        return hidden

    def call(self, block: int, batch: int, length: int) -> BlockCall:
        """How block `block` is called for a batch of that size and length, arguments on the device."""
        key = (batch, length)
        if key not in self._calls:
            self.embed(torch.zeros(batch, length, dtype=torch.long))
        recorded = self._calls[key][block]
        put = self.plan.put
        positional, keywords = put(recorded.positional), put(recorded.keywords)
        assert isinstance(positional, tuple)
        assert isinstance(keywords, dict)
        return BlockCall(positional, keywords)

    @cached_property
    def blocks_path(self) -> str:
        """Where the list of blocks lies in the model."""
        return str(next(name for name, module in self.model.named_modules() if module is self.blocks))

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] on the device; the caller holds the model there."""
        return self.differentiable_logits(tokens_BT, {})

    def differentiable_logits(self, tokens_BT: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """As `logits`, with gradients; `weights` stand in for the model's own tensors of these names."""
        keywords = {"input_ids": tokens_BT.to(self.plan.device), "use_cache": False}
        output = (
            functional_call(self.model, dict(weights), (), keywords) if weights else self.model(**keywords)
        )
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    def save(self, folder: Path) -> None:
        """Write model and tokenizer so that plain transformers loads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model source; no weights are read."""
    from transformers import AutoTokenizer

    return _described(source, AutoTokenizer, "tokenizer")


def load_config(source: ModelSource) -> Any:
    """The transformers config of a model source; no weights are read."""
    from transformers import AutoConfig

    return _described(source, AutoConfig, "config")


def _described(source: ModelSource, loader: Any, what: str) -> Any:
    folder = source.description()
    try:
        return loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model", f"its {what} cannot be loaded: {_first_line(error)}", value=folder
        ) from error


def skeleton(source: ModelSource) -> tuple[Any, nn.ModuleList]:
    """The model and its blocks on the meta device: every shape, no weights, no memory."""
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        raise ConfigError(
            "model",
            f"no causal language model can be made of its config: {_first_line(error).split('<class')[0].strip()}",
            value=f"{source.name} ({config.model_type})",
        ) from error
    return model, find_blocks(model, _num_blocks(config), source.blocks_path)


def load_model(source: ModelSource, tokenizer: Any, plan: DevicePlan) -> LoadedModel:
    """Load the weights into host memory in the plan's dtype, ready for evaluation."""
    from transformers import AutoModelForCausalLM

    folder = source.folder()
    model, told = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=plan.dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=source.trust_remote_code,
        output_loading_info=True,
    )
    # transformers fills what is missing with random numbers.
    wrong = sorted({*told["missing_keys"], *(key[0] for key in told["mismatched_keys"])})
    if wrong:
        raise RunError(
            f"{folder}: {len(wrong)} weights are missing or have another shape than the config says "
            f"({', '.join(wrong[:3])} …); save the model again with save_pretrained()"
        )
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    blocks = find_blocks(model, _num_blocks(model.config), source.blocks_path)
    return LoadedModel(source.name, model, tokenizer, blocks, plan, source.identity())


def _num_blocks(config: Any) -> int | None:
    number: int | None = getattr(config.get_text_config(), "num_hidden_layers", None)
    return number


def hidden_size_of(model: Any) -> int:
    """The width of the hidden states: what the config says, else that of the embedding."""
    said = getattr(model.config.get_text_config(), "hidden_size", None)
    return int(said or model.get_input_embeddings().weight.shape[1])


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS token at the head of a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
