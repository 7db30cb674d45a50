"""Which layers are pruned, by kind, name and block; the others stay as they were, in the model and in the record."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import reprune.model.loading
from conftest import MakeModel
from helpers import overrides_for, plan_of, run_tiny, state_bytes, timeless
from reprune import dry_run, pipeline, run
from reprune.errors import ConfigError
from reprune.model.loading import LoadedModel
from reprune.model.targets import blocks_chosen, targeted
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.tracking.progress import CONSOLE
from support import block_loop, changed, preset, state_of, trained_preset

EXPERTS = [f"mlp.experts.{kind}_proj.{expert}" for kind in ("gate_up", "down") for expert in range(4)]
# By hand, from the architectures' papers: what attends, and what does not.
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "llama": (
        [f"self_attn.{letter}_proj" for letter in "qkvo"],
        ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    ),
    "opt": ([f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")], ["fc1", "fc2"]),
    "gpt2": (["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": (
        ["attention.query_key_value", "attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "bloom": (
        ["self_attention.query_key_value", "self_attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "falcon": (
        ["self_attention.query_key_value", "self_attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "phi3": (["self_attn.qkv_proj", "self_attn.o_proj"], ["mlp.gate_up_proj", "mlp.down_proj"]),
    "mixtral": ([f"self_attn.{letter}_proj" for letter in "qkvo"], EXPERTS),
}


def _targeted(model: LoadedModel, targets: str, which: str = "all") -> list[str]:
    return targeted(list(model.blocks), model.linears, targets, which)


def _everywhere(names: list[str], blocks: range | list[int] = range(3)) -> set[str]:
    return {f"{block}.{name}" for block in blocks for name in names}


@pytest.mark.parametrize("architecture", KINDS)
def test_attention_and_mlp_of_every_architecture(make_model: MakeModel, architecture: str) -> None:
    """Catches a layer that is counted to both kinds, to none, or to the wrong one because of its class's name."""
    model = make_model(architecture)
    attention, mlp = KINDS[architecture]
    assert set(_targeted(model, "attention")) == _everywhere(attention)
    assert set(_targeted(model, "mlp")) == _everywhere(mlp)
    every = _targeted(model, "all")
    assert every == [f"{index}.{name}" for index, views in enumerate(model.linears) for name in views]
    assert sorted([*_targeted(model, "attention"), *_targeted(model, "mlp")]) == sorted(every)


@pytest.mark.parametrize(
    ("architecture", "targets", "expected"),
    [
        ("llama", "down_proj", ["mlp.down_proj"]),
        ("llama", "mlp.down_proj", ["mlp.down_proj"]),
        ("llama", "q_proj k_proj", ["self_attn.q_proj", "self_attn.k_proj"]),
        ("llama", "self_attn.[qk]_proj", ["self_attn.q_proj", "self_attn.k_proj"]),
        ("llama", "self_attn.* *.up_proj", [*KINDS["llama"][0], "mlp.up_proj"]),
        ("llama", "*", [name for kind in KINDS["llama"] for name in kind]),
        ("llama", "down_proj *.down_proj  mlp.down_proj", ["mlp.down_proj"]),
        ("opt", "fc1", ["fc1"]),
        ("opt", "fc?", ["fc1", "fc2"]),
        ("gpt2", "c_proj", ["attn.c_proj", "mlp.c_proj"]),
        ("gpt2", "mlp.c_proj", ["mlp.c_proj"]),
        ("mixtral", "mlp.experts.down_proj", EXPERTS[4:]),
        ("mixtral", "*.down_proj.*", EXPERTS[4:]),
        ("mixtral", "mlp.experts.*.2", [EXPERTS[2], EXPERTS[6]]),
    ],
)
def test_names(make_model: MakeModel, architecture: str, targets: str, expected: list[str]) -> None:
    """Catches a word that is matched within other names, or a layer that is taken twice."""
    found = _targeted(make_model(architecture), targets)
    assert len(found) == len(set(found))
    assert set(found) == _everywhere(expected)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]), ("first:1", [0]), ("first:5", [0, 1, 2, 3, 4]), ("last:2", [3, 4]), ("1:3", [1, 2]),
        ("0:5", [0, 1, 2, 3, 4]), (":2", [0, 1]), ("3:", [3, 4]), ("4:5", [4]), ("last:5", [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_blocks(which: str, expected: list[int]) -> None:
    """Catches an end that is counted in, and blocks counted from one."""
    assert list(blocks_chosen(5, which)) == expected


@pytest.mark.parametrize(
    "which",
    ["first:0", "last:0", "first:6", "last:6", "0:0", "3:2", "2:6", "5:6", "9:"],
)
def test_blocks_that_are_not_there(which: str) -> None:
    """Catches a range that is cut off at the model's end, or that is empty, without a word."""
    with pytest.raises(ConfigError) as caught:
        blocks_chosen(5, which)
    assert caught.value.key == "target_blocks"
    for word in ("5 blocks", which, "first:N", "1 to 5"):
        assert word in caught.value.screen()


@pytest.mark.parametrize("which", ["", "first", "first:", "fist:2", "first:-1", "-1:", "2", "1-3", "1:2:3", "a:b", "all:1", "first:1 last:1"])  # fmt: skip
def test_words_for_blocks_that_are_none(which: str) -> None:
    """Catches a slip that is read as another choice."""
    with pytest.raises(ConfigError, match="not understood") as caught:
        blocks_chosen(5, which)
    assert caught.value.key == "target_blocks"


@pytest.mark.parametrize(("first", "second"), [("first:1", "1:3"), ("last:2", ":1"), ("0:2", "2:")])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_together_they_are_all_layers(
    make_model: MakeModel, architecture: str, first: str, second: str
) -> None:
    """Catches a layer that no combination of kinds and blocks prunes, or two of them."""
    model = make_model(architecture)
    parts = [
        name
        for targets in ("attention", "mlp")
        for which in (first, second)
        for name in _targeted(model, targets, which)
    ]
    assert len(parts) == len(set(parts))
    assert set(parts) == set(_targeted(model, "all"))


def test_kinds_and_names_within_chosen_blocks(make_model: MakeModel) -> None:
    """Catches a choice of blocks that only `all` heeds."""
    model = make_model("llama")
    assert set(_targeted(model, "attention", "1:3")) == _everywhere(KINDS["llama"][0], [1, 2])
    assert _targeted(model, "up_proj", "last:1") == ["2.mlp.up_proj"]


def _weight_names(layers: list[str]) -> set[str]:
    return {f"model.layers.{name}.weight" for name in layers}


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda it: type(it).__name__)
@pytest.mark.parametrize(
    ("targets", "which"), [("attention", "all"), ("mlp", "last:2"), ("q_proj down_proj", "1:2")]
)
def test_only_targets_change_without_reconstruction(
    make_model: MakeModel, tmp_path: Path, pruner: Wanda | SparseGPT, targets: str, which: str
) -> None:
    """Catches a layer that is pruned, or so much as rewritten, though nobody asked for it."""
    model = make_model("llama")
    dense, chosen = state_of(model.model), _targeted(model, targets, which)
    rows, masks = block_loop(model, tmp_path, pruner=pruner, targets=chosen).run()
    assert changed(dense, model.model) == _weight_names(chosen)
    assert [f"{block}.{name}" for block, found in masks.items() for name in found] == chosen
    assert [f"{row['block']}.{name}" for row in rows for name in row["layers"]] == chosen
    for name in chosen:
        block, layer = name.split(".", 1)
        assert float(masks[int(block)][layer].double().mean()) == 0.5
    # Blocks before the first pruned one have no error, all others have one.
    first = min(int(name.split(".")[0]) for name in chosen)
    for row in rows:
        assert (row["after"]["probe"]["probe"]["error"] > 0) == (row["block"] >= first)


@pytest.mark.parametrize("technique", ["br_gp", "least_squares", "masked_lora", "submodule"])
def test_what_is_no_target_is_not_masked_by_reconstruction(
    make_model: MakeModel, tmp_path: Path, technique: str
) -> None:
    """Catches masks taken over from other layers, and targets whose removed weights come back in training."""
    model = make_model("llama")
    dense, chosen = state_of(model.model), _targeted(model, "attention")
    choices = {} if technique == "least_squares" else {"epochs": 2, "batch_size": 4, "learning_rate": 3e-3}
    technique_object = preset(technique, **choices)
    _, masks = block_loop(model, tmp_path, pruner=Wanda(), technique=technique_object, targets=chosen).run()
    after = state_of(model.model)
    for name in _weight_names(_targeted(model, "mlp")):
        assert after[name].all()
        trains = technique in ("br_gp", "masked_lora")
        assert torch.equal(after[name], dense[name]) == (not trains), name
    for full in chosen:
        block, layer = full.split(".", 1)
        assert torch.equal(after[f"model.layers.{full}.weight"] != 0, masks[int(block)][layer])


def _announced(loop: Any) -> list[int]:
    steps: list[int] = []
    loop.listener.window = lambda window, num_blocks, count: steps.append(count)
    return steps


@pytest.mark.parametrize(
    ("technique", "touched", "steps"),
    [
        ("br_gp", {1}, [0, 9, 0, 0]),
        ("br", {1}, [0, 9, 0, 0]),
        ("submodule", {1}, [0, 9, 0, 0]),
        ("br_gp_cr", {0, 1, 2}, [0, 9, 9, 0, 0]),
        ("window", {0, 1}, [9, 0]),
    ],
)
def test_windows_in_which_nothing_is_pruned_are_not_trained(
    make_model: MakeModel, tmp_path: Path, technique: str, touched: set[int], steps: list[int]
) -> None:
    """Catches training of dense blocks on their own output, which moves them by rounding, and steps that never come."""
    model = make_model("llama", num_blocks=4)
    dense = state_of(model.model)
    loop = block_loop(model, tmp_path, technique=trained_preset(technique), targets=["1.mlp.up_proj"])
    told = _announced(loop)
    rows, _ = loop.run()
    assert {int(name.split(".")[2]) for name in changed(dense, model.model)} == touched
    assert told == steps
    done: int = loop.listener.steps  # type: ignore[attr-defined]
    assert done == sum(steps)
    assert [bool(row["training"]) for row in rows] == [row["block"] in touched for row in rows]


@pytest.mark.parametrize("technique", ["br_gp_cr", "window", "least_squares"])
def test_a_resumed_run_knows_blocks_without_targets(
    make_model: MakeModel, tmp_path: Path, technique: str
) -> None:
    """Catches a block without a mask that is trained beside a pruned one, and is gone from the state after a death."""
    states, records = [], []
    for last in (0, 1, 2):
        model = make_model("llama", num_blocks=4)
        chosen = ["1.mlp.up_proj", "3.mlp.up_proj"]

        def committed(windows: int, rows: Any, new: Any, last: int = last) -> None:
            if windows == last:
                raise KeyboardInterrupt

        short = preset(technique, epochs=1, batch_size=4)
        loop = block_loop(model, tmp_path / str(last), technique=short, targets=chosen)
        loop.after_commit = committed
        if last:
            with pytest.raises(KeyboardInterrupt):
                loop.run()
            model = make_model("llama", num_blocks=4)
            loop = block_loop(model, tmp_path / str(last), technique=short, targets=chosen)
        rows, _ = loop.run()
        states.append(state_of(model.model))
        records.append(timeless(rows))
    for other, record in zip(states[1:], records[1:], strict=True):
        assert all(torch.equal(other[name], states[0][name]) for name in other)
        assert record == records[0]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models made by a config lie in the test's folder."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_the_record_counts_targets_only(tmp_path: Path) -> None:
    """Catches a sparsity diluted by layers that were to stay dense, and weights on disk that differ from the record."""
    plan, result = run_tiny(
        tmp_path / "out", "pruner=wanda", "reconstruction=none", "targets=mlp", "target_blocks=last:2"
    )
    expected = _everywhere(KINDS["llama"][1], [1, 2])
    assert set(plan.shapes.targets) == expected
    assert result["sparsity"]["total"] == 0.5
    assert result["sparsity"]["layers"] == dict.fromkeys(plan.shapes.targets, 0.5)
    # 3·32·64 of the 3·32·64 + 2·32·32 + 2·16·32 weights of a block; in two blocks of three; half of them.
    assert result["sparsity"]["of_all_prunable"] == pytest.approx(6144 / 9216 * 2 / 3 / 2)
    assert result["identity"]["targets"] == plan.shapes.targets
    masks = {name.split("masks.")[1] for name in state_bytes(plan.folder.path) if "/masks." in name}
    assert masks == expected


@pytest.mark.usefixtures("own_cache")
def test_the_hash_is_of_the_layers_not_of_the_words(tmp_path: Path) -> None:
    """Catches runs of other layers that share a folder, and one run that is done twice under two spellings."""

    def folder(*choices: str) -> str:
        return plan_of(tmp_path / "out", *choices).folder.id

    every = folder()
    assert folder("targets=*", "target_blocks=0:3") == every
    attention = folder("targets=attention")
    assert folder("targets=v_proj q_proj o_proj k_proj") == attention
    others = [folder("targets=attention", "target_blocks=first:1"), folder("target_blocks=last:1")]
    assert len({every, attention, *others}) == 4


@pytest.mark.usefixtures("own_cache")
def test_dry_run_tells_what_stays_dense(tmp_path: Path) -> None:
    """Catches a plan that promises the sparsity of the whole model."""

    def shown(*choices: str) -> str:
        with CONSOLE.capture() as capture:
            dry_run.show(plan_of(tmp_path / "out", *choices))
        return capture.get()

    part = shown("targets=down_proj", "target_blocks=first:2")
    assert "2 of 21 layers; the others stay dense" in part
    assert "2 × mlp.down_proj [32 × 64]" in part
    assert "q_proj" not in part
    assert "by sparsegpt, unstructured, uniform" in part
    assert "stay dense" not in shown()
    assert "by wanda, dsnot, 2to4, uniform" in shown("pruner=wanda", "refine=dsnot", "pattern=2to4")
    assert "unstructured" not in shown("pruner=none", "reconstruction=none")


@pytest.fixture
def _no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: None) -> None:
    def forbidden(*_: object, **__: object) -> NoReturn:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(pipeline, "load_model", forbidden)
    monkeypatch.setattr(reprune.model.loading, "load_model", forbidden)


REFUSED = {
    "targets=atention": ("targets: no layer has such a name", "atention", "did you mean 'attention'?"),
    "targets=q_prj": ("targets: no layer has such a name", "q_prj", "self_attn.q_proj", "did you mean"),
    "targets=q_proj fc1": ("targets: no layer has such a name", "fc1", "all, attention, mlp"),
    "targets=": ("targets: ", "all, attention, mlp"),
    "target_blocks=first:4": ("target_blocks: the model has 3 blocks", "first:4", "1 to 3"),
    "target_blocks=2:1": ("target_blocks: the model has 3 blocks", "2:1"),
    "target_blocks=frist:2": ("target_blocks: not understood", "frist:2", "first:N"),
    "target=mlp": ("target: unknown key", "did you mean 'targets'?"),
}


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("choice", REFUSED)
def test_refused_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: str
) -> None:
    """Catches a choice that prunes nothing, or something else, after the model is loaded: one screen, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["reprune", *overrides_for(tmp_path / "out", choice)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in told.err + told.out
    assert len(told.err.strip().splitlines()) < 10
    for word in REFUSED[choice]:
        assert word in told.err, told.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_weights")
def test_a_kind_in_a_list_of_names(tmp_path: Path) -> None:
    """Catches a hint that offers the very word that was refused."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", "targets=attention up_proj")
    assert caught.value.key == "targets"
    assert "did you mean 'attention'" not in caught.value.screen()


@pytest.mark.usefixtures("_no_weights")
def test_a_pattern_is_checked_on_the_targets_only(tmp_path: Path) -> None:
    """Catches a layer that is refused for its shape though it stays dense: 64 inputs divide by 64, 32 do not."""
    choices = ["pruner=wanda", "pattern=2to4", "pattern.kept=32", "pattern.group=64"]
    assert len(plan_of(tmp_path / "out", *choices, "targets=down_proj").rounds[0]) == 3
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", *choices)
    assert caught.value.key == "pattern.group"


def test_what_counts_as_attention(make_model: MakeModel) -> None:
    """Catches a layer's own name or class taken for its place: GPT-2's Conv1D is no convolution that mixes tokens."""
    model = make_model("gpt2")
    weights: Mapping[str, Tensor] = state_of(model.blocks[0])
    assert type(model.blocks[0].mlp.c_fc).__name__ == "Conv1D"
    assert "mlp.c_fc.weight" in weights
    assert "0.mlp.c_fc" in _targeted(model, "mlp")
