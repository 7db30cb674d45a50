"""What is known of a model without its weights: its tokenizer, its config, and every shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reprune.errors import ConfigError
from reprune.model.blocks import find_blocks
from reprune.model.checkpoint import ModelSource


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model source; no weights are read."""
    from transformers import AutoTokenizer

    return _described(source, AutoTokenizer, "tokenizer")


def load_config(source: ModelSource) -> Any:
    """The transformers config of a model source; no weights are read."""
    from transformers import AutoConfig

    return _described(source, AutoConfig, "config")


def dtype_of(source: ModelSource) -> torch.dtype | None:
    """The dtype that a model's config names; None where it names none."""
    dtype = getattr(load_config(source), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)


def _described(source: ModelSource, loader: Any, what: str) -> Any:
    folder = source.description()
    try:
        return loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model", f"its {what} cannot be loaded: {first_line(error)}", value=folder
        ) from error


def skeleton(source: ModelSource) -> tuple[Any, nn.ModuleList]:
    """The model and its blocks on the meta device: every shape, no weights, no memory."""
    return outline(load_config(source), source)


def outline(config: Any, source: ModelSource) -> tuple[Any, nn.ModuleList]:
    """The model that a transformers config makes, and its blocks, on the meta device. ConfigError where it makes none."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        raise ConfigError(
            "model",
            f"no causal language model can be made of its config: {first_line(error).split('<class')[0].strip()}",
            value=f"{source.name} ({config.model_type})",
        ) from error
    return model, find_blocks(model, num_blocks(config), source.blocks_path)


def num_blocks(config: Any) -> int | None:
    """How many blocks a config says there are; None where it does not."""
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


def first_line(error: Exception) -> str:
    """What an error says first, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
