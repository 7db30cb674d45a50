"""A model made on the spot: random weights and a byte tokenizer, for tests and dry runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reprune.cache import cached_folder
from reprune.errors import ConfigError, did_you_mean, require_positive

NUM_SPECIAL = 2


@dataclass(kw_only=True)
class TinyModel:
    """`architecture` is a transformers model type; `config` overrides fields of its config."""

    name: str = "tiny"
    architecture: str = "llama"
    num_blocks: int = 3
    hidden_size: int = 32
    weights_seed: int = 0
    add_bos: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    blocks_path: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        require_positive(num_blocks=self.num_blocks, hidden_size=self.hidden_size)
        if self.hidden_size % 8:
            raise ConfigError("hidden_size", "must divide by 8", value=self.hidden_size)
        if self.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError(
                "architecture",
                "transformers knows no such causal language model",
                value=self.architecture,
                accepted="llama, opt, gpt2, … (a transformers model type)",
                hint=did_you_mean(self.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            )

    def identity(self) -> dict[str, Any]:
        """The recipe."""
        import torch
        import transformers

        return {
            "tiny": self.architecture,
            "num_blocks": self.num_blocks,
            "hidden_size": self.hidden_size,
            "weights_seed": self.weights_seed,
            "add_bos": self.add_bos,
            "config": dict(self.config),
            "made_with": [torch.__version__, transformers.__version__],
        }

    def description(self) -> Path:
        """The made folder."""
        return self.folder()

    def folder(self) -> Path:
        """The saved model, made on first use."""
        return cached_folder("models", self.identity(), self._make)

    def _make(self, target: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer = byte_tokenizer(self.add_bos)
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.hidden_size,
            "num_hidden_layers": self.num_blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        }
        config = AutoConfig.for_model(self.architecture, **{**sizes, **self.config})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.weights_seed)
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            except (ValueError, TypeError) as error:
                problem = (str(error).splitlines() or ["its config is refused"])[0][:200]
                raise ConfigError(
                    "model.architecture",
                    f"no causal language model can be made: {problem}",
                    value=self.architecture,
                ) from error
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def byte_tokenizer(add_bos: bool) -> Any:
    """A tokenizer whose tokens are the 256 bytes and <bos>, <eos>: any UTF-8 text, nothing to train."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1, **{letter: NUM_SPECIAL + i for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
