"""The smaller model that structured pruning leaves: the same logits, or a word about why there is none."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import MakeModel
from helpers import perplexity_on, plan_of, run_tiny, write_documents
from reprune import export, pipeline
from reprune.errors import ConfigError
from reprune.model.agreement import disagreement
from reprune.model.compact import NotExpressibleError, compact
from reprune.model.coupling import find_couplings
from reprune.model.loading import LoadedModel
from reprune.seeding import generator
from support import ARCHITECTURES, load_tiny, random_text, state_of

pytestmark = pytest.mark.usefixtures("own_results")

BOTH = ("self_attn", "mlp")
SMALLER: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2"), BOTH
    ),
    "opt": ("fc1+fc2",),
    **dict.fromkeys(("gpt2", "gpt_neox", "falcon", "olmo2", "stablelm"), ("mlp",)),
    # Experts are no units.
    **dict.fromkeys(("mixtral", "qwen3_moe"), ("self_attn",)),
    # Widths that the config has no number for; a number a head that is no linear's; one unit alone.
    **dict.fromkeys(("bloom", "mpt", "gpt_oss", "olmoe"), ()),
}
WHY: dict[str, str] = {
    **dict.fromkeys(("opt", "gpt2", "gpt_neox", "stablelm", "bloom", "mpt"), "num_attention_heads=2"),
    "gpt_oss": "self_attn.sinks would be [2], not [4]",
    "olmoe": "no unit was removed",
}
"""What is said of those that are not smaller everywhere."""

Masks = dict[int, dict[str, Tensor]]


def _prune(
    model: LoadedModel, leave: Callable[[int, int], int] = lambda block, units: units - units // 2
) -> Masks:
    """Remove random units, others in every block, so that of all of them `leave(block, units)` stay."""
    masks: Masks = {}
    for block, views in enumerate(model.linears):
        masks[block] = {}
        for coupling in find_couplings(model, block):
            stream = generator(block, "units", coupling.submodule)
            units = len(coupling.columns)
            gone = torch.randperm(units, generator=stream)[leave(block, units) :]
            for name in (coupling.consumer, *coupling.rows):
                keep = torch.ones(views[name].shape, dtype=torch.bool)
                if name == coupling.consumer:
                    keep[:, coupling.columns[gone].flatten()] = False
                else:
                    keep[coupling.rows[name][gone].flatten()] = False
                views[name].write(views[name].weight * keep)
                masks[block][name] = views[name].orient(keep)
    return masks


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@torch.no_grad()
def _logits(folder: Path, tokens: Tensor, **choices: Any) -> Tensor:
    """Of what plain transformers reads."""
    logits = AutoModelForCausalLM.from_pretrained(folder, **choices).eval()(input_ids=tokens).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_smaller_model_has_the_same_logits(architecture: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Catches rows of other units, biases left or lost, configs that derive other sizes, architectures that stop working."""
    model = make_model(architecture)
    masks = _prune(model)
    if not SMALLER[architecture]:
        with pytest.raises(NotExpressibleError) as refused:
            compact(model, masks)
        assert WHY[architecture] in str(refused.value)
        return
    before = state_of(model.model)
    found = compact(model, masks)
    assert found.smaller == SMALLER[architecture]
    assert ("; ".join(found.remarks) != "") == (architecture in WHY)
    assert WHY.get(architecture, "") in "; ".join(found.remarks)
    found.model.save(tmp_path / "compact")
    model.save(tmp_path / "model")
    assert _bytes(tmp_path / "compact") < 0.95 * _bytes(tmp_path / "model")
    tokens = random_text("any").tokens_NT
    wanted = model.logits(tokens)
    torch.testing.assert_close(_logits(tmp_path / "compact", tokens), wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.model.state_dict().items())


def test_groups_of_heads_by_hand(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches query heads that lose their keys: six heads of width 8 in three groups, of which the middle one stays."""
    model = make_model(
        "qwen2", hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=4
    )
    masks = _prune(model, lambda block, units: units)
    dense = state_of(model.model)
    for block, views in enumerate(model.linears):
        view = views["self_attn.o_proj"]
        keep = torch.ones(view.shape, dtype=torch.bool)
        keep[:, :16] = keep[:, 32:] = False
        view.write(view.weight * keep)
        masks[block]["self_attn.o_proj"] = keep
    found = compact(model, masks)
    found.model.save(tmp_path)
    made = load_file(tmp_path / "model.safetensors")
    for name, tensor in dense.items():
        part = name.removeprefix("model.layers.1.self_attn.")
        if part in ("q_proj.weight", "q_proj.bias"):
            assert torch.equal(made[name], tensor[16:32])
        elif part in ("k_proj.weight", "v_proj.bias"):
            assert torch.equal(made[name], tensor[8:16])
        elif part == "o_proj.weight":
            assert torch.equal(made[name], tensor[:, 16:32])
        elif "self_attn" not in name:
            assert torch.equal(made[name], tensor)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [config[key] for key in sizes] == [2, 1, 8, 4]


def test_bias_of_the_consumer_stays(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a bias of what puts out hidden states that is cut with its columns, or lost."""
    model = make_model("llama", attention_bias=True, mlp_bias=True)
    masks = _prune(model)
    compact(model, masks).model.save(tmp_path)
    made, old = load_file(tmp_path / "model.safetensors"), model.model.state_dict()
    for name in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
        assert old[f"model.layers.2.{name}"].any()
        assert torch.equal(made[f"model.layers.2.{name}"], old[f"model.layers.2.{name}"])
    assert made["model.layers.2.mlp.up_proj.bias"].shape == (32,)
    tokens = random_text("any").tokens_NT
    torch.testing.assert_close(_logits(tmp_path, tokens), model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_bias_that_the_config_does_not_know(make_model: MakeModel) -> None:
    """Catches a bias that was added to a layer and is lost, because the config makes a model without it."""
    model = make_model("llama")
    masks = _prune(model)
    for block in model.blocks:
        block.get_submodule("mlp.down_proj").bias = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(NotExpressibleError, match=r"layers\.0\.mlp\.down_proj\.bias would be nowhere"):
        compact(model, masks)


def test_heads_that_the_config_refuses(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a model that is written and cannot be read: three heads do not divide a hidden size of 32."""
    model = make_model("llama", num_key_value_heads=4)
    found = compact(model, _prune(model, lambda block, units: units * 3 // 4))
    assert found.smaller == ("mlp",)
    [remark] = found.remarks
    assert remark.startswith("self_attn keeps its zeros: its config refuses num_attention_heads=3")
    assert "not a multiple" in remark
    found.model.save(tmp_path)
    tokens = random_text("any").tokens_NT
    torch.testing.assert_close(_logits(tmp_path, tokens), model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_blocks_of_several_sizes(make_model: MakeModel) -> None:
    """Catches one block's sizes taken for all, where others lost more units or none."""
    model = make_model("llama")
    masks = _prune(model, lambda block, units: units // 2 - (block == 1 and units > 2))
    found = compact(model, masks)
    assert found.smaller == ("self_attn",)
    assert found.remarks[0].startswith(
        "mlp keeps its zeros: between 31 and 32 of its units are left, by block"
    )
    masks[2] = {}
    with pytest.raises(
        NotExpressibleError, match=r"self_attn .* between 1 and 2 .*; mlp .* between 31 and 64 "
    ):
        compact(model, masks)


def test_nothing_removed(make_model: MakeModel) -> None:
    """Catches a copy of the dense model that is called smaller."""
    model = make_model("llama")
    with pytest.raises(NotExpressibleError, match="no unit was removed"):
        compact(model, _prune(model, lambda block, units: units))


CHANGES: dict[str, Callable[[LoadedModel], None]] = {
    "a weight of a head": lambda model: model.linears[1]["self_attn.v_proj"].stored[3].mul_(1.5),
    "a bias": lambda model: model.linears[2]["mlp.down_proj"].module.bias.add_(0.05),
    "the head": lambda model: model.model.lm_head.weight[7:].mul_(1.5),
    "not finite": lambda model: model.linears[0]["mlp.up_proj"].stored[0, 0].fill_(float("nan")),
    "the place of tokens": lambda model: model.base.rotary_emb.inv_freq.mul_(1.2),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", list(CHANGES))
@torch.no_grad()
def test_what_is_not_the_same_is_seen(change: str, dtype: str, make_model: MakeModel) -> None:
    """Catches a comparison that passes what only looks alike, above all in half precision."""
    tokens = random_text("any").tokens_NT
    model, other = (make_model("llama", dtype=dtype, mlp_bias=True) for _ in range(2))
    assert disagreement(model, other, tokens) is None
    CHANGES[change](other)
    # Without the calls that are remembered.
    differs = disagreement(model, other.with_model(other.model), tokens)
    assert differs is not None
    assert differs.startswith("its logits" if change == "the head" else "what leaves its last block")


STRUCTURED = ("pruner=magnitude", "pattern=structured", "reconstruction=none")


def _forbidden(*arguments: Any) -> Any:
    raise AssertionError("nothing is left to load a model for")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_writes_it_beside_the_model(
    dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a record, a line or a folder that tell of another model than plain transformers finds."""
    asked = (*STRUCTURED, f"dtype={dtype}", "export.model=true", "export.compact=true")
    with caplog.at_level(logging.INFO, "reprune"):
        plan, result = run_tiny(tmp_path, *asked)
    folder = plan.folder.path
    model = AutoModelForCausalLM.from_pretrained(folder / "compact")
    assert str(model.dtype) == f"torch.{dtype}"
    told = {"smaller": list(BOTH), "remarks": [], "parameters": model.num_parameters()}
    assert result["compact"] == json.loads((folder / "result.json").read_text())["compact"] == told
    assert [it for it in caplog.messages if it.startswith("compact")] == ["compact 0.0 M of 0.0 M parameters"]
    assert (folder / "compact" / "tokenizer.json").is_file()
    assert not list(folder.glob(".*.part"))
    assert _bytes(folder / "compact") < 0.8 * _bytes(folder / "model")
    tokens = random_text("any").tokens_NT
    # In float32, where no rounding hides a difference.
    one, other = (_logits(folder / name, tokens, dtype="float32") for name in ("model", "compact"))
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(pipeline, "load_model", _forbidden)
    assert run_tiny(tmp_path, *asked)[1] == result


def test_later_command_writes_it(tmp_path: Path) -> None:
    """Catches an export that counts as done without its folder, and a record that a later evaluation empties."""
    plan, first = run_tiny(tmp_path, *STRUCTURED)
    assert "compact" not in first
    folder = plan.folder.path
    later = run_tiny(tmp_path, *STRUCTURED, "export.compact=true")[1]
    assert later["compact"]["smaller"] == list(BOTH)
    assert later["id"] == first["id"]
    assert (folder / "compact" / "config.json").is_file()
    shutil.rmtree(folder / "compact")
    run_tiny(tmp_path, *STRUCTURED, "export.compact=true")
    assert (folder / "compact" / "config.json").is_file()
    write_documents(tmp_path / "text.jsonl")
    evaluated = run_tiny(tmp_path, *STRUCTURED, *perplexity_on(mine=tmp_path / "text.jsonl"))[1]
    assert len(evaluated["suite"]) == 1
    assert evaluated["compact"] == later["compact"]


def test_what_a_killed_run_left_is_written_anew(tmp_path: Path) -> None:
    """Catches files of two attempts in one folder, and a folder without its entry in the record."""
    plan, _ = run_tiny(tmp_path, *STRUCTURED)
    folder = plan.folder.path
    (folder / "result.json").unlink()
    for name in ("compact", ".compact.part"):
        (folder / name).mkdir()
        (folder / name / "left.txt").write_text("left")
    result = run_tiny(tmp_path, *STRUCTURED, "export.compact=true")[1]
    assert result["compact"]["smaller"] == list(BOTH)
    assert not (folder / ".compact.part").exists()
    assert not (folder / "compact" / "left.txt").exists()
    assert (folder / "compact" / "model.safetensors").is_file()


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_run_that_cannot_write_it_says_why_and_ends(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of work that end in an error, a model that differs in place, and a run that is never complete."""
    if architecture == "llama":
        monkeypatch.setattr(export, "disagreement", lambda *arguments: "its logits differ")
        wanted = "self_attn, mlp made smaller, the model does not put out the same: its logits differ"
    else:
        wanted = "mlp keeps its zeros: no key of the config is its size"
    asked = (*STRUCTURED, f"model.architecture={architecture}", "export.compact=true")
    with caplog.at_level(logging.INFO, "reprune"):
        plan, result = run_tiny(tmp_path, *asked)
    assert result["status"] == "finished"
    assert result["compact"].keys() == {"smaller", "remarks"}
    assert result["compact"]["smaller"] == []
    [remark] = result["compact"]["remarks"]
    assert wanted in remark
    assert f"compact not written: {remark}" in caplog.messages
    assert not list(plan.folder.path.glob("*compact*"))
    assert pipeline.nothing_left(plan)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["pattern=unstructured"], ("single weights", "pattern=structured")),
        (["pattern=structured", "allocation=depth_ramp"], ("one size for all blocks", "allocation=uniform")),
        (["pattern=structured", "allocation=owl"], ("one size for all blocks", "allocation=uniform")),
        (["pattern=structured", "target_blocks=first:2"], ("2 of 3 blocks", "target_blocks=all")),
    ],
    ids=["unstructured", "depth_ramp", "owl", "some_blocks"],
)
def test_what_cannot_become_smaller_is_refused_before_work(
    tmp_path: Path, given: list[str], told: tuple[str, ...]
) -> None:
    """Catches hours of work for a folder that no config can describe."""
    choices = ["pruner=wanda", "reconstruction=none", *given]
    plan_of(tmp_path, *choices)
    with pytest.raises(ConfigError) as refused:
        plan_of(tmp_path, *choices, "export.compact=true")
    assert refused.value.key == "export.compact"
    assert all(word in refused.value.screen() for word in told)


def test_export_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    """Catches another run id for the same numbers, and a disk or memory that is reckoned without the smaller model."""
    without, beside = (plan_of(tmp_path, *STRUCTURED, f"export.compact={on}") for on in ("false", "true"))
    assert without.folder.path == beside.folder.path
    assert beside.memory.disk - without.memory.disk == 4 * beside.shapes.num_parameters


def test_half_precision_keeps_its_bits(tmp_path: Path) -> None:
    """Catches weights that pass through another dtype on their way."""
    model = load_tiny("gemma2", dtype="bfloat16")
    compact(model, _prune(model)).model.save(tmp_path / "compact")
    made = load_file(tmp_path / "compact" / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert torch.equal(made[norm], model.model.state_dict()[norm])
    # The head is the embedding: it is there once.
    assert "lm_head.weight" not in made
