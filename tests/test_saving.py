"""What comes back from a saved model: the same logits, dtypes, ties and zeros, from one file or many; unheard-of models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from conftest import MakeModel
from helpers import plan_of
from reprune.errors import ConfigError
from reprune.model.description import load_tokenizer
from reprune.model.device import DevicePlan
from reprune.model.linears import linears_of
from reprune.model.loading import LoadedModel, load_model
from reprune.model.sources import LocalModel
from reprune.model.tiny import byte_tokenizer
from reprune.pipeline import run
from reprune.pruning.sparsegpt import SparseGPT
from support import ARCHITECTURES, CPU, block_loop, changed, some_texts, state_of, trained_preset

TOKENS = some_texts().probes[0].tokens_NT


def _loaded(folder: Path) -> Any:
    """As anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@torch.no_grad()
def _same_logits(model: LoadedModel, loaded: Any) -> bool:
    return torch.equal(loaded(input_ids=TOKENS).logits, model.logits(TOKENS))


def _is_tied(model: Any) -> bool:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return bool(embedding.data_ptr() == head.data_ptr())


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", True), ("float16", False)])
def test_what_comes_back(
    make_model: MakeModel, tmp_path: Path, architecture: str, dtype: str, tied: bool
) -> None:
    """Catches a head that is written or loaded beside the embedding it is tied to, one that is tied on the way, files in
    another dtype than the model, and zeros that training, casting or the file brings back to life.
    """
    model = make_model(architecture, num_blocks=1, dtype=dtype, tie_word_embeddings=tied)
    assert _is_tied(model.model) == tied
    texts = some_texts(num_sequences=2, length=6)
    _, masks = block_loop(model, tmp_path, texts=texts, technique=trained_preset("br_gp", epochs=1)).run()
    model.save(tmp_path / "saved")
    loaded = _loaded(tmp_path / "saved")
    assert _same_logits(model, loaded)
    assert changed(state_of(model.model), loaded) == set()
    assert _is_tied(loaded) == tied

    state = model.model.state_dict()
    assert {name: own.dtype for name, own in loaded.state_dict().items()} == {
        name: own.dtype for name, own in state.items()
    }
    file = load_file(tmp_path / "saved" / "model.safetensors")
    # Some parameters stay float32 beside float16 because the architecture says so.
    wide = {"float32"} if getattr(model.model, "_keep_in_fp32_modules", None) else set()
    assert {dtype} <= {str(own.dtype).removeprefix("torch.") for own in file.values()} <= {dtype, *wide}
    shape = model.model.get_input_embeddings().weight.shape
    assert sum(own.shape == shape for own in file.values()) == (1 if tied else 2)

    for name, keep in masks[0].items():
        view = linears_of(loaded.get_submodule(model.blocks_path)[0])[name]
        assert view.stored.dtype == model.plan.dtype
        assert not view.stored[~keep].any()
        assert int((~keep).sum()) == keep.numel() // 2


def _load_local(folder: Path, **choices: Any) -> LoadedModel:
    source = LocalModel(path=str(folder), **choices)
    return load_model(source, load_tokenizer(source), DevicePlan(CPU, torch.float32, 1))


def _model_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_shards_are_the_whole_model(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    """Catches shards that are left out, and weights that another order of files changes: the same bytes once pruned."""
    original = make_model(architecture, num_blocks=2)
    original.save(tmp_path / "whole")
    original.model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    original.tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    pruned = []
    for name in ("whole", "sharded"):
        model = _load_local(tmp_path / name)
        assert changed(state_of(original.model), model.model) == set()
        technique = trained_preset("br_gp", epochs=1)
        block_loop(
            model, tmp_path / f"{name}_run", pruner=SparseGPT(block_size=16), technique=technique
        ).run()
        model.save(tmp_path / f"{name}_pruned")
        pruned.append(_model_bytes(tmp_path / f"{name}_pruned"))
    assert pruned[0] == pruned[1]
    assert changed(state_of(original.model), _loaded(tmp_path / "sharded_pruned"))


def _sharded(make_model: MakeModel, folder: Path) -> LoadedModel:
    model = make_model("llama", num_blocks=1)
    model.model.save_pretrained(folder, max_shard_size="30KB")
    model.tokenizer.save_pretrained(folder)
    return model


def test_a_missing_shard_is_told_before_anything_is_loaded(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches an interrupted copy that ends in a stack trace, or in random numbers for what is missing."""
    _sharded(make_model, tmp_path / "model")
    last = sorted((tmp_path / "model").glob("model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ConfigError, match=rf"model\.path[\s\S]*index are missing: {last.name}"):
        plan_of(tmp_path / "out", "model=local", f"model.path={tmp_path / 'model'}")


def test_shards_without_their_index(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches shards that pass the check and fail when they are to be loaded, after the texts were made."""
    _sharded(make_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.path[\s\S]*index"):
        plan_of(tmp_path / "out", "model=local", f"model.path={tmp_path / 'model'}")


def test_the_files_that_are_hashed_are_those_that_are_read(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a single file beside shards, of which one kind is loaded and the other makes the run's identity."""
    _sharded(make_model, tmp_path / "model")
    other = make_model("llama", num_blocks=1)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(2)
    other.model.save_pretrained(tmp_path / "other")
    before = _load_local(tmp_path / "model")
    identity = before.identity
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model")
    after = _load_local(tmp_path / "model")
    assert (changed(state_of(before.model), after.model) == set()) == (after.identity == identity)


def test_a_sharded_model_goes_through_a_whole_run(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches what only a run does with a folder: its identity, its shapes, its export under plain names."""
    _sharded(make_model, tmp_path / "model")
    plan = plan_of(tmp_path / "out", "model=local", f"model.path={tmp_path / 'model'}", "export.model=true")
    assert run(plan)["sparsity"]["total"] == 0.5
    weight = _loaded(plan.folder.path / "model").model.layers[0].mlp.down_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


class _UnheardConfig(PreTrainedConfig):
    """Says under `depth` how many blocks it has and under `width` how wide they are; with `named` and `wide` also where
    everyone looks. With `keyword` the blocks are given their hidden states by name.
    """

    model_type = "unheard"

    def __init__(
        self,
        vocab_size: int = 258,
        width: int = 32,
        depth: int = 3,
        named: bool = True,
        wide: bool = True,
        keyword: bool = False,
        **rest: Any,
    ) -> None:
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.named, self.wide, self.keyword = named, wide, keyword
        if named:
            self.num_hidden_layers = depth
        if wide:
            self.hidden_size = width
        super().__init__(**rest)


class _UnheardBlock(nn.Module):
    """Mixes tokens by a decaying mean, then features; gives back a tuple, the hidden states first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.calm = nn.LayerNorm(width)
        self.listen, self.speak = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width)

    def forward(self, stream: Tensor, strength: float, *, decay_TT: Tensor) -> tuple[Tensor, Tensor]:
        mixed = decay_TT.to(stream.dtype) @ self.calm(stream)
        return stream + strength * self.speak(torch.tanh(self.listen(mixed))), mixed


class _UnheardTrunk(nn.Module):
    """Blocks that are each called with another strength, beside a list of as many smaller modules."""

    def __init__(self, config: _UnheardConfig) -> None:
        super().__init__()
        self.keyword = config.keyword
        self.lookup = nn.Embedding(config.vocab_size, config.width)
        self.shifts = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.depth))
        self.tower = nn.ModuleList(_UnheardBlock(config.width) for _ in range(config.depth))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        stream = self.lookup(input_ids)
        time = torch.arange(input_ids.shape[1])
        decay_TT = torch.exp(-(time[:, None] - time[None]).float()).tril()
        for number, block in enumerate(self.tower):
            strength = 1 / (1 + number)
            if self.keyword:
                stream, _ = block(stream=stream, strength=strength, decay_TT=decay_TT)
            else:
                stream, _ = block(stream, strength, decay_TT=decay_TT)
        return sum((shift(stream) for shift in self.shifts), stream)


class _Unheard(PreTrainedModel):
    """A language model that no library knows."""

    config_class = _UnheardConfig
    base_model_prefix = "trunk"
    _tied_weights_keys = {"mouth.weight": "trunk.lookup.weight"}  # noqa: RUF012 (transformers' own attribute)

    def __init__(self, config: _UnheardConfig) -> None:
        super().__init__(config)
        self.trunk = _UnheardTrunk(config)
        self.mouth = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.lookup

    def get_output_embeddings(self) -> nn.Module:
        return self.mouth

    def forward(self, input_ids: Tensor, use_cache: bool = False, **rest: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.mouth(self.trunk(input_ids, use_cache=use_cache)))


@pytest.fixture
def unheard() -> Iterator[None]:
    """transformers' registries with that model, as they were afterwards."""
    AutoConfig.register("unheard", _UnheardConfig)
    AutoModelForCausalLM.register(_UnheardConfig, _Unheard)
    yield
    CONFIG_MAPPING._extra_content.pop("unheard")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(_UnheardConfig)


def _save_unheard(folder: Path, **choices: Any) -> list[str]:
    """Save one with random weights; the overrides that choose it."""
    torch.manual_seed(0)
    _Unheard(_UnheardConfig(**choices)).save_pretrained(folder)
    byte_tokenizer(add_bos=True).save_pretrained(folder)
    return ["model=local", f"model.path={folder}", "export.model=true"]


def _check_unheard_run(plan: Any) -> None:
    """Every linear of every block at half, the rest of the model as it was, and the export loads."""
    source = Path(plan.config["model"]["path"])
    result = run(plan)
    names = {f"{block}.{name}" for block in range(3) for name in ("listen", "speak")}
    assert result["sparsity"]["layers"] == dict.fromkeys(names, 0.5)
    dense, pruned = _loaded(source), _loaded(plan.folder.path / "model")
    outside = {"trunk.lookup.weight", "mouth.weight"}
    outside |= {f"trunk.shifts.{number}.{kind}" for number in range(3) for kind in ("weight", "bias")}
    assert changed(state_of(dense), pruned) == set(dense.state_dict()) - outside
    for block in pruned.trunk.tower:
        for layer in (block.listen, block.speak):
            assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2


@pytest.mark.usefixtures("unheard")
def test_an_unheard_of_model_is_pruned_like_any_other(tmp_path: Path) -> None:
    """Catches a name, a class or a layout that the code takes for granted, and the wrong one of two lists."""
    chosen = _save_unheard(tmp_path / "model")
    _check_unheard_run(plan_of(tmp_path / "out", *chosen, "reconstruction=br_gp", "reconstruction.epochs=1"))


@pytest.mark.usefixtures("unheard")
def test_blocks_that_cannot_be_counted(tmp_path: Path) -> None:
    """Catches an AttributeError for a config that has another word for its number of blocks; the key that is named helps."""
    chosen = _save_unheard(tmp_path / "model", named=False)
    with pytest.raises(ConfigError) as raised:
        plan_of(tmp_path / "out", *chosen)
    assert raised.value.key == "model.blocks_path"
    assert "trunk.tower" in raised.value.screen()
    _check_unheard_run(plan_of(tmp_path / "out", *chosen, "model.blocks_path=trunk.tower"))


@pytest.mark.usefixtures("unheard")
def test_blocks_that_are_not_where_they_were_said_to_be(tmp_path: Path) -> None:
    """Catches a wrong path that is searched around, a number of blocks that fits no list, and a path that is not used."""
    chosen = _save_unheard(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model\.blocks_path[\s\S]*trunk\.towers[\s\S]*trunk\.tower\b"):
        plan_of(tmp_path / "out", *chosen, "model.blocks_path=trunk.towers")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    # With `named`, the config's constructor would set the number again.
    path.write_text(json.dumps({**config, "named": False, "num_hidden_layers": 5}))
    with pytest.raises(ConfigError, match=r"model\.blocks_path[\s\S]*5 blocks[\s\S]*trunk\.tower \(3\)"):
        plan_of(tmp_path / "out", *chosen)
    _check_unheard_run(plan_of(tmp_path / "out", *chosen, "model.blocks_path=trunk.tower"))


@pytest.mark.usefixtures("unheard")
def test_an_unheard_of_model_at_sparsity_zero(tmp_path: Path) -> None:
    """Catches arguments that blocks are called with, by position or name, of another block, and a tuple cut off wrongly."""
    _save_unheard(tmp_path / "model")
    model = _load_local(tmp_path / "model")
    rows, _ = block_loop(model, tmp_path, sparsity=0.0).run()
    errors = {text["error"] for row in rows for role in row["after"].values() for text in role.values()}
    assert errors == {0.0}
    assert [call.positional for call in model._calls[6, 12]] == [(1.0,), (0.5,), (1 / 3,)]


@pytest.mark.usefixtures("unheard")
def test_a_width_under_another_name(tmp_path: Path) -> None:
    """Catches an AttributeError for a config that has another word for the size of the hidden states."""
    chosen = _save_unheard(tmp_path / "model", wide=False)
    _check_unheard_run(plan_of(tmp_path / "out", *chosen))


@pytest.mark.usefixtures("unheard")
def test_hidden_states_under_another_name(tmp_path: Path) -> None:
    """Catches a KeyError for blocks whose hidden states are given by a name of their own."""
    chosen = _save_unheard(tmp_path / "model", keyword=True)
    _check_unheard_run(plan_of(tmp_path / "out", *chosen))
