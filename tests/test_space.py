"""The space of techniques against whole models: what each choice fits, to what, how it ends, and what it leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import MakeModel
from helpers import timeless
from reprune.calibration.roles import Texts
from reprune.engine import fitting
from reprune.errors import ConfigError, RunError
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import Pruner
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.reconstruction.gradient import Course, train
from reprune.reconstruction.losses import capped_energy, inverse_energy, uniform, weighted_loss
from reprune.reconstruction.technique import LR_SCHEDULES, Technique
from reprune.reconstruction.trainable import TrainedBlock
from reprune.seeding import generator
from support import (
    ARCHITECTURES,
    block_loop,
    block_outputs,
    changed,
    options,
    preset,
    random_text,
    some_texts,
    state_of,
    trained_preset,
)

State = dict[str, Tensor]
ALL = 99
"""A batch that holds every sample: the loss of the first epoch is that of the weights at the start."""

SUBMODULES: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "llama": [(("self_attn",), "self_attn.o_proj"), (("mlp",), "mlp.down_proj")],
    "gemma2": [
        (("self_attn", "post_attention_layernorm"), "post_attention_layernorm"),
        (("mlp", "post_feedforward_layernorm"), "post_feedforward_layernorm"),
    ],
    "opt": [(("self_attn",), "self_attn.out_proj"), (("fc1", "fc2"), "fc2")],
    "bloom": [(("self_attention",), "self_attention.dense"), (("mlp",), "mlp.dense_4h_to_h")],
    "gpt_neox": [(("attention",), "attention.dense"), (("mlp",), "mlp.dense_4h_to_h")],
    "mixtral": [(("self_attn",), "self_attn.o_proj"), (("mlp",), "mlp")],
}
"""By hand: the modules between two residual adds, and the last of them."""


def _few() -> Texts:
    """Two texts to reconstruct on; the validation text that choices are made on has another length."""
    mask = random_text("mask", num_sequences=4, length=10)
    return Texts(
        mask=[mask],
        reconstruction=[mask, random_text("more", num_sequences=3, length=10)],
        validation=[
            random_text("other", "validation", num_sequences=2, length=6),
            random_text("chosen", "validation", num_sequences=5, length=8),
        ],
    )


def _quick(name: str, **overrides: Any) -> Technique:
    """A preset at the start of whose first epoch the loss can be told from outside."""
    return trained_preset(name, **{"batch_size": ALL, "epochs": 2, **overrides})


@dataclass
class _Watched:
    """What `train` was given and left behind, training after training."""

    blocks: list[range] = field(default_factory=list)
    before: list[State] = field(default_factory=list)
    after: list[State] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    courses: list[Course] = field(default_factory=list)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> _Watched:
    """The real `train`, with everything it sees copied."""
    seen = _Watched()

    def watch(objective: Any, validation: Any, trained: Sequence[TrainedBlock], *rest: Any) -> Course:
        model = objective.model
        seen.blocks.append(range(trained[0].number, trained[-1].number + 1))
        seen.before.append(state_of(model.model))
        if hasattr(objective, "pairs"):
            seen.inputs.append(torch.cat([store.states_NTH for store in objective.pairs.inputs]))
            seen.targets.append(torch.cat([store.states_NTH for store in objective.pairs.targets]))
        course = train(objective, validation, trained, *rest)
        seen.after.append(state_of(model.model))
        seen.courses.append(course)
        return course

    monkeypatch.setattr(fitting, "train", watch)
    return seen


def _whole(model: LoadedModel, state: Mapping[str, Tensor]) -> nn.Module:
    """A second whole model with other weights; no code of the package is left in it."""
    other: nn.Module = copy.deepcopy(model.model)
    other.load_state_dict(state)
    return other


@torch.no_grad()
def _put_out(whole: nn.Module, path: str, tokens_NT: Tensor) -> Tensor:
    """What the module at `path` puts out in a plain forward pass of the whole model."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = whole.get_submodule(path).register_forward_hook(keep)
    try:
        whole(input_ids=tokens_NT, use_cache=False)
    finally:
        handle.remove()
    [output] = found
    return output


@torch.no_grad()
def _taken_in(whole: nn.Module, path: str, tokens_NT: Tensor) -> Tensor:
    """The hidden states that the module at `path` is called with in a plain forward pass of the whole model."""
    found: list[Tensor] = []

    def keep(module: nn.Module, positional: Any, keywords: Any) -> None:
        found.append((positional[0] if positional else keywords["hidden_states"]).clone())

    handle = whole.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        whole(input_ids=tokens_NT, use_cache=False)
    finally:
        handle.remove()
    [hidden] = found
    return hidden


def _tokens(texts: Texts) -> Tensor:
    return torch.cat([text.tokens_NT for text in texts.reconstruction])


def _moved(before: State, after: State) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def _weights_of(model: LoadedModel) -> set[str]:
    """The prunable parameters, by their names in the whole model."""
    return {
        f"{model.blocks_path}.{block}.{view.parameter}"
        for block, views in enumerate(model.linears)
        for view in views.values()
    }


def _assert_masks_held(model: LoadedModel, masks: Mapping[int, Mapping[str, Tensor]]) -> None:
    assert [len(masks[block]) for block in range(len(model.blocks))] == [
        len(views) for views in model.linears
    ]
    for block, views in enumerate(model.linears):
        for name, view in views.items():
            keep = masks[block][name]
            assert 0.4 < float(keep.float().mean()) < 0.6
            assert not bool(view.stored[~keep].any()), f"{block}.{name}: a pruned weight came back"


# ---------------------------------------------------------------------------- attention and MLP by themselves


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_submodules_add_up_to_the_block(make_model: MakeModel, architecture: str) -> None:
    """Catches an output taken before the norm or behind the residual add, and a part of the block that is missed."""
    model = make_model(architecture)
    tokens = random_text("mask").tokens_NT
    whole = _whole(model, state_of(model.model))
    for block in (0, 2):
        path = f"{model.blocks_path}.{block}"
        hidden = _taken_in(whole, path, tokens)
        parts = [
            _put_out(whole, f"{path}.{part.output}", tokens).view_as(hidden)
            for part in model.submodules(block)
        ]
        output = _put_out(whole, path, tokens)
        torch.testing.assert_close(hidden + torch.stack(parts).sum(dim=0), output, rtol=1e-4, atol=1e-4)
        assert len(parts) == 2
        assert all(float(part.square().mean()) > 1e-4 for part in parts), (
            "a part that adds nothing shows nothing"
        )


@pytest.mark.parametrize("architecture", SUBMODULES)
def test_submodules_are_those_found_by_hand(make_model: MakeModel, architecture: str) -> None:
    """Catches a norm behind the output that is left out, an MLP without a module of its own, and the wrong order."""
    model = make_model(architecture)
    for block in range(3):
        found = [(part.modules, part.output) for part in model.submodules(block)]
        assert found == SUBMODULES[architecture]
        assert len({part.name for part in model.submodules(block)}) == 2


@pytest.mark.parametrize("chain", ["dense", "sparse"])
@pytest.mark.parametrize("architecture", SUBMODULES)
def test_what_a_submodule_is_fitted_to(
    make_model: MakeModel, tmp_path: Path, watched: _Watched, architecture: str, chain: str
) -> None:
    """Catches a target behind the residual add, an MLP fitted on what attention put out before it was trained, and
    parameters of the rest of the block that move.

    dense: what the dense model puts out there. sparse: what the model as it stands would put out there if that one
    submodule were dense.
    """
    model, texts = make_model(architecture, num_blocks=2), _few()
    dense, tokens = state_of(model.model), _tokens(texts)
    technique = _quick("submodule", target_chain=chain)
    rows, masks = block_loop(model, tmp_path, texts=texts, pruner=Wanda(), technique=technique).run()
    expected = [(block, *part) for block in range(2) for part in SUBMODULES[architecture]]
    assert [list(blocks) for blocks in watched.blocks] == [[block] for block, _, _ in expected]
    for number, (block, modules, output) in enumerate(expected):
        path, now = f"{model.blocks_path}.{block}", watched.before[number]
        below = tuple(f"{path}.{module}." for module in modules)
        mixed = {name: (dense if name.startswith(below) else now)[name] for name in dense}
        teacher = _whole(model, dense if chain == "dense" else mixed)
        target = _put_out(teacher, f"{path}.{output}", tokens).view_as(watched.targets[number])
        torch.testing.assert_close(watched.targets[number], target, rtol=1e-4, atol=1e-5)
        student = _whole(model, now)
        hidden = _taken_in(student, path, tokens)
        torch.testing.assert_close(watched.inputs[number], hidden, rtol=1e-4, atol=1e-5)
        start = _put_out(student, f"{path}.{output}", tokens).view_as(target)
        error = float((start - target).square().mean())
        losses = watched.courses[number].epoch_losses
        assert losses[0] == pytest.approx(error, rel=1e-3)
        assert losses[1] < losses[0]
        moved = _moved(now, watched.after[number])
        assert moved
        assert all(name.startswith(below) for name in moved)
        assert {name for name in _weights_of(model) if name.startswith(below)} <= moved
    # Attention is trained when the MLP's turn comes: nothing happens in between.
    for number in (0, 2):
        assert _moved(watched.after[number], watched.before[number + 1]) == set()
    _assert_masks_held(model, masks)
    names = [part.name for part in model.submodules(0)]
    assert [[told["submodule"] for told in row["training"]] for row in rows] == [names, names]


def test_the_chains_tell_submodule_targets_apart(
    make_model: MakeModel, tmp_path: Path, watched: _Watched
) -> None:
    """Catches tolerances above in which both chains would pass: the targets differ by far more."""
    for chain in ("dense", "sparse"):
        model = make_model("llama", num_blocks=2)
        technique = _quick("submodule", target_chain=chain)
        block_loop(model, tmp_path / chain, texts=_few(), technique=technique).run()
    dense, sparse = watched.targets[:4], watched.targets[4:]
    # Only the first attention sees the same input in both.
    assert torch.allclose(dense[0], sparse[0], atol=1e-5)
    assert all(not torch.allclose(*pair, atol=1e-2) for pair in zip(dense[1:], sparse[1:], strict=True))


def test_only_submodules_with_a_pruned_layer_are_trained(
    make_model: MakeModel, tmp_path: Path, watched: _Watched
) -> None:
    """Catches attention that is trained although only one layer of the MLP was pruned, and steps promised for it."""
    model = make_model("llama")
    loop = block_loop(model, tmp_path, technique=_quick("submodule"), targets=["1.mlp.up_proj"])
    promised: list[int] = []
    loop.listener.window = lambda window, num_blocks, steps: promised.append(steps)  # type: ignore[method-assign]
    before = state_of(model.model)
    loop.run()
    assert promised == [0, 2, 0]
    moved = _moved(before, state_of(model.model))
    assert {name.rsplit(".", 2)[1] for name in moved} == {"up_proj", "gate_proj", "down_proj"}
    assert all(name.startswith("model.layers.1.mlp.") for name in moved)


def test_submodules_in_half_precision(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a submodule run in float32 on arguments of bfloat16, and a dtype that is not put back."""
    model = make_model("gemma2", dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in model.model.state_dict().items()}
    rows, _ = block_loop(model, tmp_path, technique=_quick("submodule", target_chain="sparse")).run()
    assert all(told["epoch_losses"][1] < told["epoch_losses"][0] for row in rows for told in row["training"])
    assert {name: tensor.dtype for name, tensor in model.model.state_dict().items()} == dtypes


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("choices", "windows"),
    [
        ({}, [[0, 1], [2]]),
        ({"window": 3, "stride": 3}, [[0, 1, 2]]),
        ({"window": None, "stride": None}, [[0, 1, 2]]),
    ],
)
def test_windows_side_by_side(
    make_model: MakeModel,
    tmp_path: Path,
    watched: _Watched,
    choices: dict[str, Any],
    windows: list[list[int]],
) -> None:
    """Catches windows that overlap or leave a block out, and a target that is not behind the window's last block."""
    model, texts = make_model("llama"), _few()
    dense = _whole(model, state_of(model.model))
    rows, masks = block_loop(model, tmp_path, texts=texts, technique=_quick("window", **choices)).run()
    assert [list(blocks) for blocks in watched.blocks] == windows
    for number, blocks in enumerate(windows):
        target = _put_out(dense, f"model.layers.{blocks[-1]}", _tokens(texts))
        torch.testing.assert_close(watched.targets[number], target, rtol=1e-4, atol=1e-5)
        student = _whole(model, watched.before[number])
        start = _put_out(student, f"model.layers.{blocks[-1]}", _tokens(texts))
        losses = watched.courses[number].epoch_losses
        assert losses[0] == pytest.approx(float((start - target).square().mean()), rel=1e-4)
        assert losses[1] < losses[0]
        moved = {int(name.split(".")[2]) for name in _moved(watched.before[number], watched.after[number])}
        assert moved == set(blocks)
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert [len(row["training"]) for row in rows] == [1, 1, 1]
    _assert_masks_held(model, masks)


def _one_block_or_all(
    make_model: MakeModel, folder: Path, pruner: Pruner, technique: Technique, block: int
) -> list[tuple[State, dict[str, Tensor]]]:
    """The block's weights and masks where all blocks are pruned, and where no other is."""
    found = []
    for only in (False, True):
        model = make_model("llama")
        names = [f"{index}.{name}" for index, views in enumerate(model.linears) for name in views]
        targets = [name for name in names if name.startswith(f"{block}.")] if only else names
        loop = block_loop(
            model, folder / str(only), texts=_few(), pruner=pruner, technique=technique, targets=targets
        )
        _, masks = loop.run()
        found.append((state_of(model.blocks[block]), masks[block]))
    return found


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("preset_name", ["free_lunch", "br_gp"])
def test_free_lunch_makes_blocks_independent(
    make_model: MakeModel, tmp_path: Path, pruner: Pruner, preset_name: str
) -> None:
    """Catches any chain of the three (inputs, targets, statistics) that is the pruned one, in weights or masks.

    Power: with br_gp what happened to the blocks before changes both.
    """
    technique = _quick(preset_name)
    (all_weights, all_masks), (weights, masks) = _one_block_or_all(make_model, tmp_path, pruner, technique, 2)
    same_weights = all(torch.equal(all_weights[name], weights[name]) for name in weights)
    same_masks = all(torch.equal(all_masks[name], masks[name]) for name in masks)
    assert len(masks) == 7
    assert (same_weights, same_masks) == (preset_name == "free_lunch", preset_name == "free_lunch")


def test_free_lunch_enters_windows_with_the_dense_chain(
    make_model: MakeModel, tmp_path: Path, watched: _Watched
) -> None:
    """Catches inputs or targets that are constant for another reason than being the dense model's."""
    model, texts = make_model("llama"), _few()
    dense = block_outputs(model, _tokens(texts))
    block_loop(model, tmp_path, texts=texts, technique=_quick("free_lunch")).run()
    for block in (1, 2):
        torch.testing.assert_close(watched.inputs[block], dense[block - 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(watched.targets[block], dense[block], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- masked low-rank updates


def _pruned_and_trained(
    make_model: MakeModel, folder: Path, architecture: str, technique: Technique, **choices: Any
) -> tuple[State, State, LoadedModel, list[dict[str, Any]], dict[int, dict[str, Tensor]]]:
    """What the pruner leaves of one block, and what training makes of it."""
    twin, model = make_model(architecture, num_blocks=1), make_model(architecture, num_blocks=1)
    block_loop(twin, folder / "pruned", texts=_few(), **choices).run()
    rows, masks = block_loop(model, folder / "trained", texts=_few(), technique=technique, **choices).run()
    return state_of(twin.model), state_of(model.model), model, rows, masks


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral"])
def test_masked_lora_moves_kept_weights_and_nothing_else(
    make_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    """Catches a pruned weight that comes back, a norm, bias, router or embedding that moves, and no training at all."""
    technique = _quick("masked_lora", epochs=4)
    pruned, trained, model, rows, masks = _pruned_and_trained(make_model, tmp_path, architecture, technique)
    assert _moved(pruned, trained) == _weights_of(model)
    _assert_masks_held(model, masks)
    losses = rows[0]["training"][0]["epoch_losses"]
    assert losses[-1] < losses[0]
    # B is zero, so that the first loss is that of what the pruner left.
    assert losses[0] == pytest.approx(
        (rows[0]["before"]["calibration"]["mask"]["error"] * 4 + rows[0]["before"]["calibration"]["more"]["error"] * 3)
        / 7,
        rel=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "target"),
    [("llama", "mlp.up_proj"), ("gpt2", "mlp.c_fc"), ("mixtral", "self_attn.v_proj")],
)
def test_the_update_without_a_mask_has_the_rank_that_was_asked_for(
    make_model: MakeModel, tmp_path: Path, architecture: str, target: str
) -> None:
    """Catches a rank that is not used, factors of the transposed weight, experts that share one update, and layers
    without a mask that are left out. One layer is pruned, so that there is something to restore.
    """
    technique = _quick("masked_lora", rank=3, epochs=4)
    pruned, trained, model, _, _ = _pruned_and_trained(
        make_model, tmp_path, architecture, technique, targets=[f"0.{target}"]
    )
    for name in _weights_of(model):
        if target in name:
            continue
        change = (trained[name] - pruned[name]).double()
        for matrix in change if change.dim() == 3 else [change]:
            singular = torch.linalg.svdvals(matrix)
            # Rounding of the merged weight is all that is left beyond the rank.
            assert float(singular[3] / singular[0]) < 1e-4
            assert float(singular[2] / singular[0]) > 1e-3
        if change.dim() == 3:
            together = torch.linalg.svdvals(change.reshape(-1, change.shape[-1]))
            assert float(together[3] / together[0]) > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_mask_lies_on_one_low_rank_update(
    make_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    """Catches a mask in the wrong layout, and kept weights that are trained one by one: of a rank-1 update every 2×2
    minor of kept weights is singular, whatever else is masked.
    """
    technique = _quick("masked_lora", rank=1, epochs=4)
    pruned, trained, model, _, masks = _pruned_and_trained(make_model, tmp_path, architecture, technique)
    for name, view in model.linears[0].items():
        full = f"{model.blocks_path}.0.{view.parameter}"
        change, keep = (trained[full] - pruned[full]).double()[:24, :24], masks[0][name][:24, :24].double()
        first = torch.einsum("ij,kl->ikjl", change, change)
        difference = first - first.transpose(2, 3)
        corners = torch.einsum("ij,kl,il,kj->ikjl", keep, keep, keep, keep).bool()
        size = float(first[corners].abs().mean())
        assert float(difference[corners].abs().mean()) < 1e-3 * size
        # Power: minors with a masked corner are not singular.
        assert float(difference[~corners].abs().mean()) > 0.1 * size


def test_without_a_scale_nothing_moves(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a scale that is not used, and a merge of nothing that moves weights."""
    technique = _quick("masked_lora", lora_scale=0.0)
    pruned, trained, _, _, _ = _pruned_and_trained(make_model, tmp_path, "llama", technique)
    assert _moved(pruned, trained) == set()


def test_masked_lora_depends_on_the_training_seed_only(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches factors drawn from the global stream, and blocks that start from the same draw."""
    states = []
    for number, (noise, seed) in enumerate([(1, 0), (2, 0), (1, 1)]):
        model = make_model("llama", num_blocks=2)
        torch.manual_seed(noise)
        technique = trained_preset("masked_lora")
        block_loop(model, tmp_path / str(number), texts=_few(), technique=technique, seed=seed).run()
        states.append(state_of(model.model))
    assert _moved(states[0], states[1]) == set()
    assert _moved(states[0], states[2]) == _weights_of(model)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_bias_norm_moves_vectors_only(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    """Catches a weight or router that moves by one bit, a norm that does not, and a loss that stays."""
    technique = _quick("bias_norm", epochs=4, learning_rate=1e-2)
    pruned, trained, model, rows, _ = _pruned_and_trained(make_model, tmp_path, architecture, technique)
    moved = _moved(pruned, trained)
    assert all(trained[name].dim() == 1 and name.startswith(f"{model.blocks_path}.0.") for name in moved)
    assert {name for name in trained if "norm" in name and name.startswith(f"{model.blocks_path}.")} <= moved
    losses = rows[0]["training"][0]["epoch_losses"]
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------- the optimiser, on its own


@dataclass
class _Quadratic:
    """Σ a (θ − c)² over a parameter, the same for each of its samples."""

    parameter: nn.Parameter
    curvature: Tensor
    centre: Tensor
    samples: int = 1

    def __len__(self) -> int:
        return self.samples

    def loss(self, samples: Sequence[int], weights: Callable[[int], State]) -> Tensor:
        value = weights(0).get("weight", self.parameter)
        return (self.curvature * (value - self.centre).square()).sum()


def _quadratic(samples: int = 1) -> tuple[_Quadratic, TrainedBlock, Tensor]:
    stream = generator(0, "quadratic")
    mask = (torch.rand(6, 5, generator=stream) < 0.6).float()
    parameter = nn.Parameter(torch.randn(6, 5, generator=stream) * mask, requires_grad=False)
    curvature = 0.5 + torch.rand(6, 5, generator=stream)
    centre = torch.randn(6, 5, generator=stream)
    block = TrainedBlock(0, {"weight": parameter}, {"weight": mask})
    return _Quadratic(parameter, curvature, centre, samples), block, mask


def _sgd(**overrides: Any) -> Technique:
    fixed = {"optimiser": "sgd", "betas": [0.0, 0.0], "lr_schedule": "constant", "batch_size": 1}
    return preset("br_gp", **{**fixed, **overrides})


def _fit(objective: Any, block: TrainedBlock, technique: Technique, on_step: Any = lambda: None) -> Course:
    return train(objective, None, [block], technique, generator(0, "order"), on_step, "here")


@pytest.mark.parametrize("anchor", [0.0, 0.3, 5.0])
def test_the_anchor_on_a_quadratic(anchor: float) -> None:
    """Catches a penalty that is averaged, doubled, measured from zero or from the last step, or told as part of the
    loss: the minimum of Σ a (θ − c)² + λ ‖θ − θ₀‖² is (a c + λ θ₀)/(a + λ).
    """
    objective, block, mask = _quadratic()
    start = objective.parameter.detach().clone()
    course = _fit(objective, block, _sgd(anchor=anchor, epochs=200, learning_rate=0.1))
    a, c = objective.curvature, objective.centre
    expected = mask * (a * c + anchor * start) / (a + anchor)
    torch.testing.assert_close(objective.parameter.detach(), expected, rtol=1e-4, atol=1e-5)
    error = float((a * (expected - c).square()).sum())
    assert course.epoch_losses[-1] == pytest.approx(error, rel=1e-4)
    assert course.epoch_losses[0] == pytest.approx(float((a * (start - c).square()).sum()), rel=1e-5)


def test_the_anchor_of_a_low_rank_update() -> None:
    """Catches a penalty on the factors instead of the weights: with full rank the minimum is that of the weights."""
    objective, block, mask = _quadratic()
    start = objective.parameter.detach().clone()
    technique = preset(
        "masked_lora", rank=6, lora_scale=1.0, anchor=0.7, batch_size=1, epochs=800, learning_rate=1e-2
    )
    _fit(objective, block, technique)
    a, c = objective.curvature, objective.centre
    expected = start + mask * ((a * c + 0.7 * start) / (a + 0.7) - start)
    torch.testing.assert_close(objective.parameter.detach(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("preset_name", ["br_gp", "masked_lora"])
def test_a_stronger_anchor_keeps_weights_nearer(
    make_model: MakeModel, tmp_path: Path, preset_name: str
) -> None:
    """Catches an anchor that does nothing in the block loop; 0 is the same as none, to the bit."""
    distances = {}
    for anchor in (None, 0.0, 1e-2, 1.0, 1e4):
        given = {} if anchor is None else {"anchor": anchor}
        technique = trained_preset(preset_name, epochs=5, learning_rate=1e-3, **given)
        pruned, trained, _, rows, _ = _pruned_and_trained(
            make_model, tmp_path / str(anchor), "llama", technique
        )
        squares = [float((trained[name] - pruned[name]).double().square().sum()) for name in trained]
        distances[anchor] = (sum(squares) ** 0.5, rows[0]["training"][0]["epoch_losses"])
    assert distances[None] == distances[0.0]
    lengths = [distances[anchor][0] for anchor in (0.0, 1e-2, 1.0, 1e4)]
    assert all(later < earlier for earlier, later in pairwise(lengths))
    assert lengths[-1] < 0.2 * lengths[0]
    # What is told is the distance to the target alone: a penalty of 1e4 times anything would show.
    assert max(distances[1e4][1]) < 2 * distances[0.0][1][0]


def _share(schedule: str, step: int, total: int, warm: int) -> float:
    """The share of the learning rate at a step, by hand."""
    if schedule == "constant":
        return 1.0
    if step < warm:
        return step / warm
    progress = (step - warm) / (total - warm)
    if schedule == "constant_with_warmup":
        return 1.0
    return 1 - progress if schedule in {"linear", "polynomial"} else (1 + math.cos(math.pi * progress)) / 2


@dataclass
class _Slope:
    """A loss whose gradient is one everywhere: each step is the learning rate of the moment."""

    parameter: nn.Parameter
    samples: int

    def __len__(self) -> int:
        return self.samples

    def loss(self, samples: Sequence[int], weights: Callable[[int], State]) -> Tensor:
        return self.parameter.sum()


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [(schedule, warmup) for schedule in LR_SCHEDULES for warmup in (0.0, 0.25) if schedule != "constant" or not warmup],
)  # fmt: skip
def test_learning_rates_of_every_step(schedule: str, warmup: float) -> None:
    """Catches a schedule that counts epochs for steps or forgets the short last batch, and a warmup that is ignored."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
    seen = [0.0]
    # 2 + 2 + 1 samples an epoch: 3 steps of 4 epochs.
    technique = _sgd(lr_schedule=schedule, warmup=warmup, epochs=4, batch_size=2, learning_rate=0.5)
    block = TrainedBlock(0, {"bias": parameter}, {})
    _fit(_Slope(parameter, 5), block, technique, lambda: seen.append(-float(parameter.detach())))
    steps = [(later - earlier) / 0.5 for earlier, later in pairwise(seen)]
    warm = 3 if warmup else 0
    assert steps == pytest.approx([_share(schedule, step, 12, warm) for step in range(12)], abs=1e-5)


# ------------------------------------------------------------------------------------------- token weights


def _random_pair(massive: bool = True) -> tuple[Tensor, Tensor]:
    stream = generator(0, "tokens")
    target = torch.randn(3, 7, 4, generator=stream)
    if massive:
        target[1, 2] *= 1e4
    return target + 0.1 * torch.randn(3, 7, 4, generator=stream), target


def test_token_weights_by_hand() -> None:
    """Catches weights made of norms for squares, of the batch for the sequence, or of the mean for the median."""
    target = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], [[0.0, 1e4], [2.0, 0.0], [1.0, 0.0]]])
    assert uniform(target).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert inverse_energy(target)[0].tolist() == pytest.approx([1, 1 / 4, 1 / 9])
    assert capped_energy(target)[0].tolist() == pytest.approx([1, 1, 4 / 9])
    assert capped_energy(target)[1].tolist() == pytest.approx([4e-8, 1, 1])


@pytest.mark.parametrize("weight", [uniform, inverse_energy, capped_energy])
def test_a_tokens_weight_is_its_own_sequences(weight: Callable[[Tensor], Tensor]) -> None:
    """Catches a weight that depends on what else is in the batch; none is infinite, with a token of 10⁴ times the norm."""
    _, target = _random_pair()
    together = weight(target)
    assert together.shape == target.shape[:2]
    assert torch.isfinite(together).all()
    assert (together > 0).all()
    for row in range(3):
        assert torch.equal(weight(target[row : row + 1])[0], together[row])


def test_capped_energy_leaves_half_of_the_tokens_alone() -> None:
    """Catches a cap on every token: those up to the median count fully, and the others by how far they are above it."""
    _, target = _random_pair()
    weights, energies = capped_energy(target), target.square().sum(dim=-1)
    for row in range(3):
        middle = sorted(energies[row].tolist())[3]
        for energy, found in zip(energies[row].tolist(), weights[row].tolist(), strict=True):
            assert found == pytest.approx(min(1.0, middle / energy), rel=1e-5)
        assert int((weights[row] == 1).sum()) == 4


def test_uniform_weights_are_the_plain_mean() -> None:
    """Catches a weighted mean that differs from the study's objective in the last bits."""
    student, target = _random_pair()
    found = weighted_loss("mse", "uniform", student, target)
    assert torch.equal(found, (student - target).square().mean(dim=-1).mean())
    assert float(found) == pytest.approx(float(nn.functional.mse_loss(student, target)), rel=1e-5)


def test_inverse_energy_makes_mse_a_relative_error() -> None:
    """Catches weights that are not normalised, or normalised by what depends on the student."""
    _, target = _random_pair()
    ratios = []
    for number in range(4):
        student = target + torch.randn(target.shape, generator=generator(number, "student"))
        relative = float(weighted_loss("relative_mse", "uniform", student, target))
        ratios.append(float(weighted_loss("mse", "inverse_energy", student, target)) / relative)
    # Σ‖e‖²/(H‖h‖²) / Σ 1/‖h‖² over mean(‖e‖²/‖h‖²).
    expected = target.shape[0] * target.shape[1] / 4 / float((1 / target.square().sum(dim=-1)).sum())
    assert ratios == pytest.approx([expected] * 4, rel=1e-4)


@pytest.mark.parametrize("loss", ["mse", "relative_mse", "cosine"])
@pytest.mark.parametrize("weight", ["inverse_energy", "capped_energy"])
def test_every_loss_with_every_weight_by_hand(loss: str, weight: str) -> None:
    """Catches weights that are applied to the student, twice, or to the mean of the batch."""
    student, target = _random_pair()
    s, t = student.double(), target.double()
    total = amount = 0.0
    for row in range(3):
        energies = [float(token @ token) for token in t[row]]
        for index, energy in enumerate(energies):
            given = 1 / energy if weight == "inverse_energy" else min(1.0, sorted(energies)[3] / energy)
            error = s[row, index] - t[row, index]
            value = {
                "mse": float(error @ error) / 4,
                "relative_mse": float(error @ error) / energy,
                "cosine": 1 - float(s[row, index] @ t[row, index] / (s[row, index].norm() * t[row, index].norm())),
            }[loss]  # fmt: skip
            total, amount = total + given * value, amount + given
    assert float(weighted_loss(loss, weight, student, target)) == pytest.approx(total / amount, rel=1e-3)


@pytest.mark.parametrize("weight", ["inverse_energy", "capped_energy"])
@pytest.mark.parametrize("preset_name", ["br_gp", "submodule", "masked_lora"])
def test_token_weights_reach_the_training(
    make_model: MakeModel, tmp_path: Path, watched: _Watched, weight: str, preset_name: str
) -> None:
    """Catches a field that is read and not used."""
    model, texts = make_model("llama", num_blocks=1), _few()
    block_loop(model, tmp_path, texts=texts, technique=_quick(preset_name, token_weight=weight)).run()
    path = "model.layers.0" + (".self_attn.o_proj" if preset_name == "submodule" else "")
    student = _put_out(_whole(model, watched.before[0]), path, _tokens(texts)).double()
    target = watched.targets[0].double()
    energies = target.square().sum(dim=-1)
    middle = energies.sort(dim=1).values[:, 4:5]
    weights = 1 / energies if weight == "inverse_energy" else torch.minimum(middle / energies, torch.ones(()))
    errors = (student - target).square().mean(dim=-1)
    expected = float((weights * errors).sum() / weights.sum())
    assert watched.courses[0].epoch_losses[0] == pytest.approx(expected, rel=1e-3)
    assert float(errors.mean()) != pytest.approx(expected, rel=1e-2), "the data do not tell weights apart"
    assert watched.courses[0].epoch_losses[1] < watched.courses[0].epoch_losses[0]


# ------------------------------------------------------------------------------------------- stopping


STOPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("br_gp", {}),
    "sparse": ("br", {}),
    "masked_lora": ("masked_lora", {"rank": 8}),
    "submodule": ("submodule", {"target_chain": "sparse"}),
    "full": ("full", {}),
    "bfloat16": ("br_gp", {}),
}


def _stopping(case: str, **overrides: Any) -> Technique:
    name, choices = STOPPED[case]
    return preset(name, **{**choices, "batch_size": 2, "lr_schedule": "constant", "epochs": 12, **overrides})


def _one_block(make_model: MakeModel, case: str) -> LoadedModel:
    return make_model("llama", num_blocks=1, dtype="bfloat16" if case == "bfloat16" else "float32")


@pytest.mark.parametrize("case", STOPPED)
def test_the_best_epoch_is_kept(make_model: MakeModel, tmp_path: Path, case: str) -> None:
    """Catches weights of the last epoch or of the one after the best, patience off by one, a choice made on another
    text, and a course that a look at the validation text changes: the result is that of a run of so many epochs.
    """
    rate = 3e-3 if case == "full" else 1e-2
    model, texts = _one_block(make_model, case), _few()
    chosen = _stopping(case, learning_rate=rate, stop_on="chosen", patience=2)
    rows, _ = block_loop(model, tmp_path / "stopped", texts=texts, technique=chosen).run()
    # With two submodules the second starts from the best of the first, so that only the first can be compared.
    told = rows[0]["training"][0]
    losses, best = told["validation_losses"], told["best_epoch"]
    assert best == min(range(len(losses)), key=losses.__getitem__)
    assert 0 < best < 10, "the data do not show a best epoch in the middle"
    assert len(losses) == best + 3
    assert len(told["epoch_losses"]) == len(losses) - 1

    twin = _one_block(make_model, case)
    plain = _stopping(case, learning_rate=rate, epochs=best)
    twin_rows, _ = block_loop(twin, tmp_path / "plain", texts=texts, technique=plain).run()
    differing = changed(state_of(twin.model), model.model)
    if case == "submodule":
        differing = {name for name in differing if ".self_attn." in name}
    assert differing == set()
    assert twin_rows[0]["training"][0]["epoch_losses"] == told["epoch_losses"][:best]
    assert "validation_losses" not in twin_rows[0]["training"][0]


@pytest.mark.parametrize("case", ["dense", "masked_lora", "bfloat16"])
def test_validation_losses_are_the_reported_errors(make_model: MakeModel, tmp_path: Path, case: str) -> None:
    """Catches a validation loss of another text, target or chain, batches of two sizes averaged as equals, and a loss
    of other weights than those that are kept. Two whole models measure the same.
    """
    model, texts = _one_block(make_model, case), _few()
    chosen = _stopping(case, learning_rate=3e-3, stop_on="chosen", epochs=4)
    rows, _ = block_loop(model, tmp_path, texts=texts, technique=chosen).run()
    told, row = rows[0]["training"][0], rows[0]
    close = 2e-2 if case == "bfloat16" else 1e-4
    before = row["before"]["validation"]["chosen"]["error"]
    after = row["after"]["validation"]["chosen"]["error"]
    assert told["validation_losses"][0] == pytest.approx(before, rel=close)
    assert told["validation_losses"][told["best_epoch"]] == pytest.approx(after, rel=close)
    assert after < before
    assert row["before"]["validation"]["other"]["error"] != pytest.approx(before, rel=close)


def test_validation_losses_on_the_sparse_chain(
    make_model: MakeModel, tmp_path: Path, watched: _Watched
) -> None:
    """Catches a validation target of the dense chain where training has that of the dense block on the pruned chain."""
    model, texts = make_model("llama", num_blocks=2), _few()
    dense = state_of(model.model)
    technique = _stopping("sparse", learning_rate=1e-3, stop_on="chosen", epochs=2)
    block_loop(model, tmp_path, texts=texts, technique=technique).run()
    tokens, now = texts.validation[1].tokens_NT, watched.before[1]
    teacher = {name: (dense if name.startswith("model.layers.1.") else now)[name] for name in dense}
    target = _put_out(_whole(model, teacher), "model.layers.1", tokens)
    student = _put_out(_whole(model, now), "model.layers.1", tokens)
    error = float((student - target).square().mean())
    assert watched.courses[1].validation_losses[0] == pytest.approx(error, rel=1e-4)
    chain = float((student - _put_out(_whole(model, dense), "model.layers.1", tokens)).square().mean())
    assert chain != pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("case", STOPPED)
def test_where_training_only_hurts_the_pruners_weights_stay(
    make_model: MakeModel, tmp_path: Path, case: str
) -> None:
    """Catches an epoch 0 that is no candidate, and a merge of nothing that moves weights."""
    twin, model = _one_block(make_model, case), _one_block(make_model, case)
    block_loop(twin, tmp_path / "pruned", texts=_few()).run()
    # A random model's language loss can be worse than chance: a large rate only makes it forget everything.
    rate = 0.1 if case == "full" else 3.0
    harmful = _stopping(case, learning_rate=rate, stop_on="chosen", patience=3)
    rows, _ = block_loop(model, tmp_path / "trained", texts=_few(), technique=harmful).run()
    assert changed(state_of(twin.model), model.model) == set()
    for told in rows[0]["training"]:
        assert told["best_epoch"] == 0
        assert len(told["validation_losses"]) == 4
        assert all(math.isfinite(loss) and loss > told["validation_losses"][0] for loss in told["validation_losses"][1:])  # fmt: skip
    assert rows[0]["before"] == rows[0]["after"]


def test_a_validation_text_alone_changes_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a text that is only looked at and still takes part in training or stopping."""
    states = []
    for number, texts in enumerate([_few(), Texts(mask=_few().mask, reconstruction=_few().reconstruction)]):
        model = make_model("llama", num_blocks=2)
        rows, _ = block_loop(
            model, tmp_path / str(number), texts=texts, technique=trained_preset("br_gp")
        ).run()
        assert all(
            set(told) == {"window", "epoch_losses", "seconds"} for row in rows for told in row["training"]
        )
        states.append(state_of(model.model))
    assert _moved(*states) == set()


def test_the_epochs_that_patience_cuts_off_are_no_steps(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches training that goes on behind the end of patience."""
    model = make_model("llama", num_blocks=1)
    harmful = _stopping("dense", learning_rate=3.0, stop_on="chosen", patience=1)
    loop = block_loop(model, tmp_path, texts=_few(), technique=harmful)
    loop.run()
    # One epoch of 7 samples in batches of 2.
    assert loop.listener.steps == 4  # type: ignore[attr-defined]


def test_a_validation_loss_that_is_no_number_is_an_error() -> None:
    """Catches a training that is thrown away in silence, as no epoch is better than NaN."""
    objective, block, _ = _quadratic()
    nowhere = _Quadratic(objective.parameter, objective.curvature * math.nan, objective.centre)
    technique = _sgd(epochs=2, learning_rate=0.1)
    with pytest.raises(RunError, match=r"here.*not finite"):
        train(objective, nowhere, [block], technique, generator(0, "order"), lambda: None, "here")


# ------------------------------------------------------------------------------------------- the language-model loss


def _language_loss(whole: nn.Module, tokens_NT: Tensor) -> Tensor:
    """What transformers itself makes of it."""
    loss: Tensor = whole(input_ids=tokens_NT, labels=tokens_NT, use_cache=False).loss
    return loss


FULL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}, {}),
    "gemma2 bfloat16": ("gemma2", {"dtype": "bfloat16"}, {}),
    "masked_lora": ("llama", {}, {"trainable": "masked_lora"}),
    "bias_norm": ("opt", {}, {"trainable": "bias_norm"}),
    "mixtral": ("mixtral", {}, {}),
    "gpt2 masked_lora": ("gpt2", {"tie_word_embeddings": True}, {"trainable": "masked_lora"}),
}


def _buffers(model: nn.Module) -> State:
    """All of them; those that no checkpoint holds are not in a state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.named_buffers()}


@pytest.mark.parametrize("case", FULL)
def test_full_trains_blocks_on_transformers_own_loss(
    make_model: MakeModel, tmp_path: Path, case: str
) -> None:
    """Catches tokens shifted the wrong way, a loss of the dense model, of unpruned blocks or of half precision; an
    embedding, final norm, head or buffer that moves or changes its dtype; and a block without its row.
    """
    architecture, choices, technique_choices = FULL[case]
    twin, model = make_model(architecture, **choices), make_model(architecture, **choices)
    texts = _few()
    block_loop(twin, tmp_path / "pruned", texts=texts, pruner=Wanda()).run()
    buffers = _buffers(model.model)
    dtypes = {name: parameter.dtype for name, parameter in model.model.named_parameters()}
    technique = _quick("full", epochs=3, learning_rate=5e-3, **technique_choices)
    loop = block_loop(model, tmp_path / "full", texts=texts, pruner=Wanda(), technique=technique)
    rows, masks = loop.run()
    with torch.no_grad():
        # Training computes in float32 whatever the model's dtype is.
        start = float(_language_loss(copy.deepcopy(twin.model).float(), _tokens(texts)))
    told = rows[0]["training"][0]
    assert told["epoch_losses"][0] == pytest.approx(start, rel=1e-3 if "bfloat16" in case else 1e-5)
    assert told["epoch_losses"][2] < told["epoch_losses"][0]
    with torch.no_grad():
        end = float(_language_loss(copy.deepcopy(model.model).float(), _tokens(texts)))
    assert end < told["epoch_losses"][0]

    assert [row["block"] for row in rows] == [0, 1, 2]
    assert all(timeless(row["training"]) == timeless(rows[0]["training"]) for row in rows)
    assert loop.state.windows_done() == 1
    _assert_masks_held(model, masks)
    moved = changed(state_of(twin.model), model.model)
    assert moved
    assert all(name.startswith(f"{model.blocks_path}.") for name in moved)
    assert {int(name.removeprefix(f"{model.blocks_path}.").split(".")[0]) for name in moved} == {0, 1, 2}
    after = _buffers(model.model)
    assert buffers.keys() == after.keys()
    assert all(after[name].dtype == tensor.dtype for name, tensor in buffers.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in buffers.items())
    assert {name: parameter.dtype for name, parameter in model.model.named_parameters()} == dtypes
    if choices.get("tie_word_embeddings"):
        assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight


def test_the_rotary_buffers_of_a_bfloat16_model_are_float32(make_model: MakeModel) -> None:
    """Catches a model in which the check of buffers above has nothing to check."""
    buffers = _buffers(make_model("llama", dtype="bfloat16").model)
    assert {tensor.dtype for name, tensor in buffers.items() if "inv_freq" in name} == {torch.float32}


def test_a_step_of_full_is_the_masked_gradient(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches gradients that do not reach the first block, or that the head and the embedding share in."""
    twin, model, texts = make_model("llama"), make_model("llama"), _few()
    _, masks = block_loop(twin, tmp_path / "pruned", texts=texts).run()
    technique = preset(
        "full", optimiser="sgd", betas=[0.0, 0.0], epochs=1, batch_size=ALL, lr_schedule="constant", learning_rate=0.1
    )  # fmt: skip
    block_loop(model, tmp_path / "full", texts=texts, technique=technique).run()
    pruned, trained = state_of(twin.model), state_of(model.model)
    whole = twin.model.requires_grad_(True)
    _language_loss(whole, _tokens(texts)).backward()
    for name, parameter in whole.named_parameters():
        if not name.startswith("model.layers."):
            assert torch.equal(trained[name], pruned[name])
            continue
        block, layer = int(name.split(".")[2]), name.split(".", 3)[3].removesuffix(".weight")
        gradient = parameter.grad * masks[block][layer] if layer in masks[block] else parameter.grad
        torch.testing.assert_close(trained[name] - pruned[name], -0.1 * gradient, rtol=1e-2, atol=1e-6)


def test_full_stops_on_the_language_loss_of_the_validation_text(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Catches a validation loss that is an error of activations, or that of the text trained on."""
    model, texts = make_model("llama"), _few()
    technique = preset("full", epochs=3, batch_size=2, learning_rate=1e-3, stop_on="chosen")
    rows, _ = block_loop(model, tmp_path, texts=texts, technique=technique).run()
    told = rows[0]["training"][0]
    with torch.no_grad():
        end = float(_language_loss(model.model, texts.validation[1].tokens_NT))
    assert told["validation_losses"][told["best_epoch"]] == pytest.approx(end, rel=1e-5)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "wrong", "key"),
    [
        ("br", {"window": None}, "stride"),
        ("br", {"stride": None}, "stride"),
        ("window", {"stride": 3}, "stride"),
        ("br", {"window": 0}, "window"),
        ("br", {"stride": 0}, "stride"),
        ("submodule", {"window": 2}, "window"),
        ("submodule", {"window": None, "stride": None}, "window"),
        ("br", {"loss": "cross_entropy"}, "loss"),
        ("submodule", {"loss": "cross_entropy"}, "loss"),
        ("full", {"input_chain": "dense"}, "loss"),
        ("full", {"token_weight": "capped_energy"}, "loss"),
        ("full", {"granularity": "submodule"}, "window"),
        ("masked_lora", {"rank": 0}, "rank"),
        ("masked_lora", {"lora_scale": math.inf}, "lora_scale"),
        ("br", {"anchor": -1.0}, "anchor"),
        ("br", {"anchor": math.nan}, "anchor"),
        ("br", {"patience": 0}, "patience"),
        ("br", {"batch_size": 0}, "batch_size"),
        ("br", {"weight_decay": math.inf}, "weight_decay"),
        ("br", {"learning_rate": math.inf}, "learning_rate"),
        ("br", {"clip_norm": 0.0}, "clip_norm"),
        ("br", {"warmup": 1.0}, "warmup"),
        ("br", {"warmup": -0.1}, "warmup"),
        ("br", {"warmup": 0.1, "lr_schedule": "constant"}, "warmup"),
        ("br", {"learning_rate": 1e-7, "lr_schedule": "polynomial"}, "learning_rate"),
        ("br", {"betas": [0.9, 1.0]}, "betas"),
        ("br", {"token_weight": "energy"}, "token_weight"),
        ("br", {"trainable": "lora"}, "trainable"),
        ("br", {"lr_schedule": "inverse_sqrt"}, "lr_schedule"),
        ("br", {"granularity": "layer"}, "granularity"),
        ("br", {"statistics_chain": "both"}, "statistics_chain"),
        ("br", {"within_block": "apart"}, "within_block"),
        ("br", {"optimiser": "lion"}, "optimiser"),
    ],
)
def test_points_that_are_not_in_the_space(name: str, wrong: dict[str, Any], key: str) -> None:
    """Catches a combination that would train something else than it says, or fail hours later."""
    with pytest.raises(ConfigError) as caught:
        preset(name, **wrong)
    assert caught.value.key == f"reconstruction.{key}"


# ------------------------------------------------------------------------------------------- every preset


def _nothing_is_trainable(model: LoadedModel) -> bool:
    return all(not own.requires_grad and own.grad is None for own in model.model.parameters())


@pytest.mark.parametrize("name", options("reconstruction"))
def test_every_preset_holds_masks_and_leaves_no_gradients(
    make_model: MakeModel, tmp_path: Path, name: str
) -> None:
    """Catches a way of training that forgets the mask, and gradients that a later window or export would carry."""
    model = make_model("llama")
    stops = {} if preset(name).last_layer_iterations else {"stop_on": "chosen"}
    rows, masks = block_loop(
        model, tmp_path, texts=_few(), pruner=Wanda(), technique=_quick(name, **stops)
    ).run()
    _assert_masks_held(model, masks)
    assert _nothing_is_trainable(model)
    assert all(math.isfinite(row["after"]["calibration"]["mask"]["error"]) for row in rows)
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["br_gp", "submodule", "masked_lora", "full"])
def test_a_failed_training_leaves_no_gradients(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    """Catches parameters that stay float32 or trainable when a loss is not finite."""
    model = make_model("llama", dtype="bfloat16")
    with pytest.raises(RunError):
        block_loop(model, tmp_path, texts=_few(), technique=_quick(name, learning_rate=1e30, epochs=4)).run()
    assert _nothing_is_trainable(model)
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}


class _Killed(BaseException):
    """Nobody catches it."""


RESUMED: dict[str, tuple[dict[str, Any], Sequence[str] | None]] = {
    "submodule": ({"target_chain": "sparse"}, None),
    "least_squares": ({}, None),
    "masked_lora": ({"stop_on": "chosen"}, None),
    "window": ({}, None),
    "free_lunch": ({}, None),
    "full": ({}, None),
    "br_gp_cr": ({}, ["1.mlp.up_proj", "2.mlp.up_proj"]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_killed_after_any_window_ends_the_same(
    make_model: MakeModel, tmp_path: Path, name: str
) -> None:
    """Catches dense weights, masks, random streams or rows that a resumed run has not; also with a block that has no
    mask at all.
    """
    choices, targets = RESUMED[name]

    def loop_in(folder: Path, model: LoadedModel) -> Any:
        return block_loop(
            model, folder, texts=_few(), pruner=SparseGPT(), targets=targets,
            technique=trained_preset(name, **{"epochs": 2, **choices}),
        )  # fmt: skip

    model = make_model("llama")
    undisturbed = loop_in(tmp_path / "undisturbed", model)
    rows, masks = undisturbed.run()
    windows = undisturbed.state.windows_done()
    # Killed after the first window, resumed and killed after the next, and so on: each resume is the last one's heir.
    folder = tmp_path / "killed"
    for last in range(1, windows + 1):
        doomed = loop_in(folder, make_model("llama"))

        def die(done: int, rows: Any, new: Any, last: int = last) -> None:
            if done == last:
                raise _Killed

        doomed.after_commit = die
        with pytest.raises(_Killed):
            doomed.run()
    resumed = make_model("llama")
    found_rows, found_masks = loop_in(folder, resumed).run()
    assert changed(state_of(model.model), resumed.model) == set()
    assert timeless(found_rows) == timeless(rows)
    assert {block: set(layers) for block, layers in found_masks.items() if layers} == {
        block: set(layers) for block, layers in masks.items() if layers
    }
    for block, layers in found_masks.items():
        assert all(torch.equal(keep, masks[block][layer]) for layer, keep in layers.items())


def test_reconstruction_lowers_the_error_of_the_last_block(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a technique that lowers its own loss and leaves the model as bad as before, on the text it was given."""
    last = {}
    for name in ("none", "submodule", "window", "masked_lora", "bias_norm", "least_squares"):
        technique = preset(name) if name in {"none", "least_squares"} else trained_preset(name)
        rows, _ = block_loop(
            make_model("llama"), tmp_path / name, texts=some_texts(), technique=technique
        ).run()
        last[name] = rows[-1]["after"]["calibration"]["mask"]["error"]
    assert all(error < last["none"] for name, error in last.items() if name != "none"), last
