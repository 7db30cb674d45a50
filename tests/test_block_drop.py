"""Dropping blocks: the model that is left is the dense one with blocks passed over, loads anywhere, and is pruned like any other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import MakeModel
from helpers import perplexity_on, plan_of, run_tiny, state_bytes, timeless, write_documents
from reprune import pipeline
from reprune.check import check
from reprune.compose import compose_run
from reprune.engine.activations import Stores
from reprune.errors import ConfigError, RunError
from reprune.eval_setting import EvaluatedRun
from reprune.files import read_json
from reprune.model.loading import LoadedModel
from reprune.model.shortening import shorten_config, shortened
from reprune.model.tiny import TinyModel
from reprune.transform.block_drop import BlockDrop
from reprune.transform.contract import Surroundings
from support import ARCHITECTURES, block_outputs, random_text, some_texts

TOKENS = random_text("a").tokens_NT
ONE = ["transform=block_drop", "transform.count=1"]
LEFT = ["reconstruction=none"]

pytestmark = pytest.mark.usefixtures("own_results")


def _source(architecture: str, num_blocks: int = 4, **config: Any) -> TinyModel:
    fields = {**ARCHITECTURES.get(architecture, {}), **config}
    return TinyModel(architecture=architecture, num_blocks=num_blocks, config=fields)


@torch.no_grad()
def _passed_over(model: LoadedModel, dropped: list[int]) -> Tensor:
    """Logits of the whole model in which what enters some blocks leaves them."""

    def undo(module: Any, inputs: Any, keywords: Any, output: Any) -> Any:
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [model.blocks[block].register_forward_hook(undo, with_kwargs=True) for block in dropped]
    logits: Tensor = model.model(input_ids=TOKENS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_what_is_left_loads_anywhere(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    """Catches layer types, window sizes or cache places that stay with the old numbers, and a config of another model."""
    model = make_model(architecture, num_blocks=4)
    wanted = _passed_over(model, [1])
    assert not torch.equal(wanted, model.logits(TOKENS))
    left = shortened(model, _source(architecture), [0, 2, 3], TOKENS)
    assert torch.equal(left.logits(TOKENS), wanted)
    assert left.dense_numbers == [0, 2, 3]
    left.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=TOKENS).logits, wanted)
    assert set(loaded.state_dict()) == set(left.model.state_dict())
    # The one that was loaded puts out the same logits, so that its cache is what is left to see.
    written = [
        it.generate(TOKENS[:2], max_new_tokens=5, do_sample=False, use_cache=cache)
        for it, cache in ((left.model, False), (left.model, True), (loaded, True))
    ]
    assert all(torch.equal(written[0], other) for other in written)


def test_dropped_twice(make_model: MakeModel) -> None:
    """Catches numbers of the dense model that are lost when what is left loses a block again."""
    model = make_model("gemma2", num_blocks=4)
    wanted = _passed_over(model, [0, 2])
    left = shortened(
        shortened(model, _source("gemma2"), [1, 2, 3], TOKENS), _source("gemma2"), [0, 2], TOKENS
    )
    assert torch.equal(left.logits(TOKENS), wanted)
    assert left.dense_numbers == [1, 3]
    assert left.model.config.layer_types == ["full_attention", "full_attention"]


def test_lists_of_the_config() -> None:
    """Catches token ids or sizes that are taken for entries of blocks, and block numbers taken for entries."""

    class Config:
        def __init__(self) -> None:
            self.num_hidden_layers = 4
            self.layer_types = ["a", "b", "c", "d"]
            self.dense_layers = [0, 2, 3]
            self.no_rope_layers = [1, 1, 0, 1]
            self.eos_token_id = [1, 2, 3, 0]
            self.sizes = [7, 8]
            self.every_layer = [0, 1, 2, 3]

        def get_text_config(self) -> Config:
            return self

    config = Config()
    shorten_config(config, [0, 1, 3])
    assert vars(config) == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "d"],
        "dense_layers": [0, 2],
        "no_rope_layers": [1, 1, 1],
        "eos_token_id": [1, 2, 3, 0],
        "sizes": [7, 8],
        "every_layer": [0, 1, 2],
    }


REFUSED = {
    # A number in the scale of attention; a constant made of the number; experts from the second block on.
    "gpt2": ({"scale_attn_by_inverse_layer_idx": True}, "scaling"),
    "diffllama": ({}, "lambda_init"),
    "glm4_moe": ({"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}, "other modules"),
}  # fmt: skip


@pytest.mark.parametrize("architecture", list(REFUSED))
def test_what_a_config_cannot_say_is_refused(tmp_path: Path, architecture: str) -> None:
    """Catches a block that computes something else under its new number once the model is loaded again."""
    fields, told = REFUSED[architecture]
    chosen = ["model.num_blocks=4", f"model.architecture={architecture}", f"+model.config={fields}"]
    chosen = [it.replace("'", "").replace("True", "true").replace(": ", ":") for it in chosen]
    with pytest.raises(ConfigError, match=rf"transform[\s\S]*{told}"):
        plan_of(tmp_path, *chosen, "transform=block_drop", "transform.blocks=[0]")
    # The last block can go: no other number changes.
    assert plan_of(tmp_path, *chosen, "transform=block_drop", "transform.blocks=[3]").shapes.num_blocks == 3


def test_a_number_that_is_not_seen_is_found_when_it_counts(make_model: MakeModel) -> None:
    """Catches a model that saves as another one because of what no attribute shows."""
    model = make_model("llama", num_blocks=3)
    model.blocks[2].register_forward_hook(lambda module, inputs, output: output.tanh())
    with pytest.raises(RunError, match="as its config makes it"):
        shortened(model, _source("llama", 3), [0, 2], TOKENS)


def _around(model: LoadedModel, folder: Path, source: TinyModel) -> Surroundings:
    stores = Stores(model.plan.dtype, 32, folder / "activations", on_disk=False)
    return Surroundings(source, some_texts(), (), stores, folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_influence_against_a_loop_over_tokens(make_model: MakeModel, tmp_path: Path, dtype: str) -> None:
    """Catches means of means, cosines of flattened sequences, text of another role, and the wrong end of the ranking."""
    model = make_model("qwen3", num_blocks=4, dtype=dtype)
    tokens = some_texts().mask[0].tokens_NT
    states = [model.embed(tokens), *block_outputs(model, tokens)]
    wanted = []
    for before, after in pairwise(states):
        pairs = zip(before.double().flatten(0, 1), after.double().flatten(0, 1), strict=True)
        each = [1 - float(one @ other / (one.norm() * other.norm())) for one, other in pairs]
        wanted.append(sum(each) / len(each))
    left = BlockDrop(count=2).apply(model, _around(model, tmp_path, _source("qwen3")))
    record = read_json(tmp_path / "transform.json")
    assert record["influence"] == pytest.approx(wanted, rel=1e-6)
    lowest = sorted(range(4), key=lambda block: wanted[block])[:2]
    assert record["dropped"] == sorted(lowest)
    assert left.dense_numbers == [block for block in range(4) if block not in lowest]
    assert record["parameters"]["before"] > record["parameters"]["after"]
    assert record["parameters"]["after"] == sum(it.numel() for it in left.model.parameters())


def test_of_equal_blocks_the_first_goes() -> None:
    """Catches a choice that depends on how a sort treats equals."""
    assert BlockDrop(count=2)._lowest([0.5, 0.25, 0.5, 0.25, 0.25]) == [1, 3]


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["transform=block_drop"], "transform.count"),
        ([*ONE, "transform.blocks=[0]"], "transform.count"),
        (["transform=block_drop", "transform.count=0"], "transform.count"),
        (["transform=block_drop", "transform.count=3"], "transform.count"),
        (["transform=block_drop", "transform.blocks=[]"], "transform.blocks"),
        (["transform=block_drop", "transform.blocks=[1,1]"], "transform.blocks"),
        (["transform=block_drop", "transform.blocks=[3]"], "transform.blocks"),
        (["transform=block_drop", "transform.blocks=[-1]"], "transform.blocks"),
        (["transform=block_drop", "transform.blocks=[0,1,2]"], "transform.blocks"),
        ([*ONE, "target_blocks=first:3"], "target_blocks"),
        ([*ONE, "reconstruction=window", "reconstruction.window=3"], "reconstruction.window"),
    ],
)  # fmt: skip
def test_choices_that_make_no_sense(tmp_path: Path, given: list[str], key: str) -> None:
    """Catches what would fail, or be clipped in silence, after the model was loaded."""
    with pytest.raises(ConfigError) as raised:
        plan_of(tmp_path, *given)
    assert raised.value.key == key


def test_blocks_that_differ_have_to_be_named(tmp_path: Path) -> None:
    """Catches layers that are allocated to before it is known which of them there will be."""
    fields = REFUSED["glm4_moe"][0]
    chosen = ["model.architecture=glm4_moe", f"+model.config={fields}".replace("'", "").replace(": ", ":")]
    with pytest.raises(ConfigError, match=r"transform\.count[\s\S]*block 2 has other layers[\s\S]*blocks=\["):
        plan_of(tmp_path, *chosen, *ONE)
    shapes = plan_of(tmp_path, *chosen, "transform=block_drop", "transform.blocks=[2]").shapes
    assert shapes.num_blocks == 2
    assert not any(layer.expert for layer in shapes.layers.values())


METHODS = {
    "windows": ["model.num_blocks=5", "transform.blocks=[1,3]", "reconstruction=br_gp_cr", "target_blocks=last:2"],
    "allocation": ["transform.blocks=[0]", "model.num_blocks=4", "pruner=fisher", "allocation=cfsp", *LEFT],
    "drop": ["transform.blocks=[1]", "pruner=none", *LEFT],
}  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_is_one_on_the_model_without_the_blocks(tmp_path: Path, method: str) -> None:
    """Catches anything that still goes by the dense model's blocks: targets, windows, allocations, gradients, the export."""
    chosen = [*METHODS[method], "transform=block_drop"]
    transform = [it for it in chosen if it.startswith(("transform", "model"))]
    plan, _ = run_tiny(tmp_path / "drop", *transform, "pruner=none", *LEFT, "export.model=true")
    local = ["model=local", f"model.path={plan.folder.path / 'model'}"]
    rest = [it for it in chosen if it not in transform]
    other, wanted = run_tiny(tmp_path / "other", *local, *rest, "export.model=true")
    own, found = run_tiny(tmp_path / "own", *chosen, "export.model=true")
    assert state_bytes(own.folder.path) == state_bytes(other.folder.path)
    assert timeless(own.folder.blocks()) == timeless(other.folder.blocks())
    assert found["metrics"] == wanted["metrics"]
    assert found["sparsity"] == wanted["sparsity"]
    saved = [(it.folder.path / "model" / "model.safetensors").read_bytes() for it in (own, other)]
    assert saved[0] == saved[1]
    assert "transform" not in wanted
    assert found["transform"]["class"] == "BlockDrop"


class Killed(BaseException):
    """Nobody catches it."""


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that measures anew on going on, or restores blocks of the shortened model into the dense one."""
    chosen = [*ONE, "model.num_blocks=4", "reconstruction=br_gp_cr"]
    undisturbed, wanted = run_tiny(tmp_path / "a", *chosen)

    def die(windows: int) -> None:
        if windows == 2:
            raise Killed

    plan = plan_of(tmp_path / "b", *chosen)
    with pytest.raises(Killed):
        pipeline.run(plan, die)
    monkeypatch.setattr("reprune.transform.block_drop._influence", lambda *_: pytest.fail("measured again"))
    result = pipeline.run(plan_of(tmp_path / "b", *chosen))
    assert state_bytes(plan.folder.path) == state_bytes(undisturbed.folder.path)
    assert timeless(plan.folder.blocks()) == timeless(undisturbed.folder.blocks())
    assert (result["metrics"], result["transform"]) == (wanted["metrics"], wanted["transform"])


def test_evaluated_later(tmp_path: Path) -> None:
    """Catches blocks that are held against others of the dense model, and a run that cannot be evaluated any more."""
    write_documents(tmp_path / "mine.jsonl")
    suite = [it.replace("perplexity", "fidelity") for it in perplexity_on(mine=tmp_path / "mine.jsonl")]
    chosen = ["transform=block_drop", "transform.blocks=[1]", "pruner=none", *LEFT]
    _, wanted = run_tiny(tmp_path / "a", *chosen, *suite)
    errors = {
        name.rpartition("/")[2]: value
        for name, value in wanted["metrics"].items()
        if "fidelity/mine/hidden_error" in name
    }
    assert set(errors) == {"0", "2", "final"}
    assert errors["0"] == 0 < errors["2"]
    plan, _ = run_tiny(tmp_path / "b", *chosen, "export.model=true")
    for state in (True, False):
        if not state:
            for file in (plan.folder.path / "state").iterdir():
                file.unlink()
            for file in (plan.folder.path / "evaluations").glob("*.json"):
                file.unlink()
        EvaluatedRun.of(plan.folder.path, suite).evaluate()
        result = read_json(plan.folder.path / "result.json")
        assert result["metrics"] == wanted["metrics"]
        assert result["transform"] == wanted["transform"]


def test_a_shorter_model_from_elsewhere_has_no_errors_by_block(tmp_path: Path, make_model: MakeModel) -> None:
    """Catches a zip over blocks of two models that do not correspond."""
    from reprune.eval_saved import EvaluatedModel

    dense = make_model("llama", num_blocks=3)
    dense.save(tmp_path / "dense")
    shortened(dense, _source("llama", 3), [0, 2], TOKENS).save(tmp_path / "short")
    write_documents(tmp_path / "mine.jsonl")
    suite = [it.replace("perplexity", "fidelity") for it in perplexity_on(mine=tmp_path / "mine.jsonl")]
    asked = EvaluatedModel.of(str(tmp_path / "short"), suite, str(tmp_path / "dense"), None)
    asked.evaluate()
    [found] = asked.results()
    hidden = [name for name in found.metrics if "hidden_error" in name]
    assert hidden == ["fidelity/mine/hidden_error/final"]
    assert any("2 blocks beside 3" in note for note in found.notes)


def test_identity(tmp_path: Path) -> None:
    """Catches run ids that change where there is no transform, and two names for one run."""
    bare, none = plan_of(tmp_path), plan_of(tmp_path, "transform=none")
    assert bare.folder.id == none.folder.id
    assert "transform" not in bare.identity
    named = [plan_of(tmp_path, "transform=block_drop", f"transform.blocks=[{it}]").folder.id for it in ("0,2", "2,0", "0,1")]  # fmt: skip
    assert named[0] == named[1] != named[2]
    assert len({bare.folder.id, *named, plan_of(tmp_path, *ONE).folder.id}) == 4


def test_masks_of_other_numbers_are_refused(tmp_path: Path) -> None:
    """Catches a mask that lands on another block than it was made for."""
    whole, _ = run_tiny(tmp_path, *LEFT, "pruner=magnitude", "target_blocks=first:1")
    short, _ = run_tiny(tmp_path, *LEFT, "pruner=magnitude", "target_blocks=first:1", *ONE)
    mask = ["pruner=mask", "sparsity=null", "target_blocks=first:1", *LEFT]
    with pytest.raises(ConfigError, match="numbers them anew"):
        plan_of(tmp_path, *mask, f"pruner.path={whole.folder.path}", *ONE)
    with pytest.raises(ConfigError, match="blocks were dropped in this run"):
        plan_of(tmp_path, *mask, f"pruner.path={short.folder.path}")


def test_a_dry_run_shows_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan of the dense model's blocks."""
    from reprune import dry_run

    plan = plan_of(tmp_path, *ONE)
    dry_run.show(check(compose_run(list(plan.composed.overrides))))
    told = capsys.readouterr().out
    assert "BlockDrop (count=1)" in told
    assert "2, hidden 32" in told
