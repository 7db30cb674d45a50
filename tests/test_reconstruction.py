"""Reconstruction against whole models: what goes into a window, what it is fitted to, and the error that is reported."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import MakeModel
from helpers import timeless
from reprune.engine import fitting
from reprune.engine.activations import Activations
from reprune.engine.loop import BlockLoop
from reprune.errors import ConfigError, RunError
from reprune.model.loading import LoadedModel
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.reconstruction.gradient import Course, in_float32, train
from reprune.reconstruction.losses import cosine, mse, relative_mse
from reprune.reconstruction.objective import Pairs, WindowObjective, check_lengths
from reprune.reconstruction.technique import Technique
from reprune.reconstruction.trainable import PIECE, choose, mask_
from reprune.seeding import generator
from support import block_loop, block_outputs, changed, options, preset, some_texts, state_of, trained_preset

State = dict[str, Tensor]
TECHNIQUES = ["none", "br", "br_gp", "br_gp_cr"]


@dataclass
class _Watched:
    """What `train` was given and left behind, window after window."""

    blocks: list[range] = field(default_factory=list)
    before: list[State] = field(default_factory=list)
    after: list[State] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)
    targets: list[list[Tensor]] = field(default_factory=list)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> _Watched:
    """The real `train`, with everything it sees copied."""
    seen = _Watched()

    def watch(objective: WindowObjective, *rest: Any) -> Course:
        model = objective.model
        seen.blocks.append(objective.blocks)
        seen.before.append(state_of(model.model))
        seen.inputs.append([store.states_NTH.clone() for store in objective.pairs.inputs])
        seen.targets.append([store.states_NTH.clone() for store in objective.pairs.targets])
        course = train(objective, *rest)
        seen.after.append(state_of(model.model))
        return course

    monkeypatch.setattr(fitting, "train", watch)
    return seen


def _fit_block(model: LoadedModel, masks: Mapping[str, Tensor], pairs: Pairs, technique: Technique) -> None:
    """Train block 0 on some pairs."""
    objective = WindowObjective(model, range(1), pairs, technique.loss, technique.token_weight)
    with in_float32(model.plan, [model.blocks[0]]):
        block = choose(0, model.blocks[0], model.linears[0], masks, technique.trainable, None)
        train(objective, None, [block], technique, generator(0, "order"), lambda: None, "block 0")


def _with(model: LoadedModel, state: Mapping[str, Tensor]) -> LoadedModel:
    """A second whole model with other weights."""
    other = copy.deepcopy(model.model)
    other.load_state_dict(state)
    return LoadedModel(model.name, other, model.tokenizer, other.model.layers, model.plan, {})


def _mixed(dense: State, current: State, from_block: int) -> State:
    """The weights of `current` in the blocks before `from_block`, dense weights from there on."""
    early = tuple(f"model.layers.{index}." for index in range(from_block))
    return {name: current[name] if name.startswith(early) else dense[name] for name in dense}


def _entering(model: LoadedModel, tokens_NT: Tensor, block: int) -> Tensor:
    if block == 0:
        return model.model.get_input_embeddings()(tokens_NT)
    return block_outputs(model, tokens_NT)[block - 1]


@pytest.mark.parametrize(
    ("technique", "windows"),
    [("br", [[0], [1]]), ("br_gp", [[0], [1]]), ("br_gp_cr", [[0], [0, 1], [1]])],
)
def test_inputs_and_targets_of_every_window(
    make_model: MakeModel, tmp_path: Path, watched: _Watched, technique: str, windows: list[list[int]]
) -> None:
    """Catches a student fed by the dense chain, by unpruned or untrained earlier blocks, and the wrong teacher.

    Inputs: the model as it stands at that moment. Targets: br, dense weights on that input; br_gp and br_gp_cr, the
    dense model's output behind the last block of the window.
    """
    model = make_model("llama", num_blocks=2)
    dense = state_of(model.model)
    texts = some_texts()
    block_loop(model, tmp_path, texts=texts, pruner=Wanda(), technique=trained_preset(technique)).run()
    assert [list(blocks) for blocks in watched.blocks] == windows
    for number, blocks in enumerate(watched.blocks):
        now = watched.before[number]
        assert all(now[f"model.layers.{b}.mlp.up_proj.weight"].eq(0).float().mean() == 0.5 for b in blocks)
        teacher = _with(model, _mixed(dense, now, blocks.start) if technique == "br" else dense)
        for index, text in enumerate(texts.reconstruction):
            expected = _entering(_with(model, now), text.tokens_NT, blocks.start)
            torch.testing.assert_close(watched.inputs[number][index], expected, rtol=1e-5, atol=1e-5)
            target = block_outputs(teacher, text.tokens_NT)[blocks.stop - 1]
            torch.testing.assert_close(watched.targets[number][index], target, rtol=1e-5, atol=1e-5)
    # Power: the pruned and trained block 0 moves what enters block 1 by far more than the tolerance.
    last = watched.inputs[-1][0]
    assert not torch.allclose(last, _entering(_with(model, dense), texts.mask[0].tokens_NT, 1), atol=1e-2)
    # Training leaves the blocks outside its window alone, and a pruned block is not pruned again.
    for blocks, before, after in zip(watched.blocks, watched.before, watched.after, strict=True):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert all(int(name.split(".")[2]) in blocks for name in moved)
    for earlier, later in zip(watched.after, watched.before[1:], strict=False):
        entered = {name for name in earlier if not torch.equal(earlier[name], later[name])}
        assert all(name.startswith("model.layers.1.") for name in entered)


@pytest.mark.parametrize("chain", ["sparse", "dense"])
def test_dense_inputs_are_the_dense_chain(
    make_model: MakeModel, tmp_path: Path, watched: _Watched, chain: str
) -> None:
    """Catches an `input_chain` that is read but not used."""
    model = make_model("llama", num_blocks=2)
    dense, texts = state_of(model.model), some_texts()
    technique = trained_preset("br_gp", input_chain=chain)
    block_loop(model, tmp_path, texts=texts, technique=technique).run()
    from_dense = block_outputs(_with(model, dense), texts.mask[0].tokens_NT)[0]
    assert torch.allclose(watched.inputs[1][0], from_dense, atol=1e-5) == (chain == "dense")


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_reported_errors_are_those_of_two_whole_models(
    make_model: MakeModel, tmp_path: Path, technique: str, pruner: Wanda | SparseGPT
) -> None:
    """Catches err_i measured before a block is trained a last time, on the wrong chain, or divided by something else."""
    model, texts = make_model("llama"), some_texts()
    dense = _with(model, state_of(model.model))
    rows, _ = block_loop(
        model, tmp_path, texts=texts, pruner=pruner, technique=trained_preset(technique)
    ).run()
    assert [row["block"] for row in rows] == [0, 1, 2]
    for text in texts.all:
        pairs = zip(block_outputs(dense, text.tokens_NT), block_outputs(model, text.tokens_NT), strict=True)
        for row, (target, student) in zip(rows, pairs, strict=True):
            found = row["after"][text.role][text.name]
            difference = target.double() - student.double()
            error = difference.square().sum() / target.numel()
            relative = (difference.norm(dim=-1) / target.double().norm(dim=-1)).square().mean()
            assert found["error"] == pytest.approx(float(error), rel=1e-4)
            assert found["relative"] == pytest.approx(float(relative), rel=1e-4)
            assert found["error"] > 1e-3
    assert {role: set(found) for role, found in rows[0]["after"].items()} == {
        "calibration": {"mask", "more"},
        "probe": {"probe"},
    }


def test_without_training_before_is_after(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches two measurements of one thing that disagree."""
    rows, _ = block_loop(make_model("llama"), tmp_path).run()
    assert all(row["before"] == row["after"] for row in rows)


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (3, 1), (3, 2), (2, 2), (3, 3)])
def test_without_training_the_window_does_not_matter(
    make_model: MakeModel, tmp_path: Path, window: int, stride: int
) -> None:
    """Catches a measurement taken over from pruning in a window that has no new block: they share one config hash."""
    plain_model, model = make_model("llama"), make_model("llama")
    plain, _ = block_loop(plain_model, tmp_path / "plain", pruner=SparseGPT()).run()
    technique = preset("none", window=window, stride=stride)
    rows, _ = block_loop(model, tmp_path / "windows", pruner=SparseGPT(), technique=technique).run()
    assert changed(state_of(plain_model.model), model.model) == set()
    assert timeless(rows) == timeless(plain)


def test_reconstruction_lowers_the_reported_error(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches training that lowers its own loss and leaves the model as bad as before."""
    last = {}
    for technique in TECHNIQUES:
        rows, _ = block_loop(
            make_model("llama"),
            tmp_path / technique,
            technique=trained_preset(technique, epochs=0 if technique == "none" else 8),
        ).run()
        last[technique] = rows[-1]["after"]["calibration"]["mask"]["error"]
    assert max(last["br"], last["br_gp"], last["br_gp_cr"]) < last["none"]
    assert last["br_gp"] < last["br"]


def _trained(make_model: MakeModel, folder: Path, noise: int, seed: int) -> State:
    model = make_model("llama")
    loop = block_loop(model, folder, technique=trained_preset("br_gp_cr"), seed=seed)
    torch.manual_seed(noise)
    state = torch.get_rng_state()
    loop.run()
    assert torch.equal(torch.get_rng_state(), state), "the run draws from the global stream"
    return state_of(model.model)


def test_the_order_of_samples_is_the_runs_own(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a permutation from the global stream, and a training seed that changes nothing."""
    first = _trained(make_model, tmp_path / "a", noise=1, seed=0)
    second = _trained(make_model, tmp_path / "b", noise=2, seed=0)
    other = _trained(make_model, tmp_path / "c", noise=1, seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_activations_on_disk_change_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches stores on disk that share a file, or stay behind."""
    states = []
    for on_disk in (False, True):
        model = make_model("llama")
        folder = tmp_path / str(on_disk)
        loop = block_loop(model, folder, technique=trained_preset("br"), on_disk=on_disk)
        loop.run()
        states.append(state_of(model.model))
        assert not on_disk or (folder / "activations").is_dir()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert list((tmp_path / "True" / "activations").iterdir()) == []


def _store(states: Tensor) -> Activations:
    num_sequences, length, hidden = states.shape
    made = Activations((num_sequences, length, hidden), torch.float32, None)
    made.write(slice(0, num_sequences), states)
    return made


@dataclass
class _Step:
    """One plain SGD step on one block: the change of every parameter, and the gradient worked out apart from it."""

    change: State
    gradient: State
    masks: dict[str, Tensor]


def _one_step(make_model: MakeModel, clip_norm: float | None, rate: float = 1.0) -> _Step:
    model = make_model("llama", num_blocks=1)
    block, tokens = model.blocks[0], some_texts().mask[0].tokens_NT
    inputs, target = model.embed(tokens), block_outputs(model, tokens)[0]
    masks = {}
    for name, view in model.linears[0].items():
        masks[name] = torch.rand(view.shape, generator=generator(0, "mask", name)) < 0.5
        view.write(view.weight * masks[name])
    before = state_of(block)
    twin = copy.deepcopy(block).requires_grad_(True)
    output = model.call(0, *tokens.shape).run(twin, inputs)
    (output - target).square().mean().backward()
    gradient = {
        name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None
    }

    technique = preset(
        "br_gp", optimiser="sgd", betas=[0.0, 0.0], epochs=1, batch_size=99, learning_rate=rate,
        lr_schedule="constant", clip_norm=clip_norm,
    )  # fmt: skip
    pairs = Pairs([_store(inputs)], [_store(target)])
    _fit_block(model, masks, pairs, technique)
    after = state_of(block)
    change = {name: after[name] - before[name] for name in gradient}
    return _Step(change, gradient, masks)


def _kept(step: _Step) -> State:
    return {
        name: gradient * step.masks[name.removesuffix(".weight")]
        if name.removesuffix(".weight") in step.masks
        else gradient
        for name, gradient in step.gradient.items()
    }


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def test_a_step_is_the_masked_gradient_of_the_mean_square(make_model: MakeModel) -> None:
    """Catches a loss scaled by batch or length, a gradient that misses norms, and masked weights that move."""
    step = _one_step(make_model, clip_norm=None)
    for name, gradient in _kept(step).items():
        torch.testing.assert_close(step.change[name], -gradient, rtol=1e-3, atol=1e-6)
    assert len(step.change) == 9


def test_clipping_counts_kept_weights_only(make_model: MakeModel) -> None:
    """Catches a norm that includes the gradient of masked weights: the step would be shorter than it may be."""
    step = _one_step(make_model, clip_norm=0.01)
    kept = _kept(step)
    assert _norm(step.gradient) > 1.1 * _norm(kept) > 0.011, "the data do not tell the two norms apart"
    assert _norm(step.change) == pytest.approx(0.01, rel=1e-3)
    for name, gradient in kept.items():
        torch.testing.assert_close(step.change[name], -gradient * 0.01 / _norm(kept), rtol=1e-2, atol=1e-6)


def test_a_large_clip_norm_changes_nothing(make_model: MakeModel) -> None:
    """Catches gradients that are scaled up to the bound."""
    step = _one_step(make_model, clip_norm=1e6)
    assert _norm(step.change) == pytest.approx(_norm(_kept(step)), rel=1e-3)


@pytest.mark.parametrize("technique", ["br_gp", "br_gp_cr"])
def test_a_huge_learning_rate_names_the_block(make_model: MakeModel, tmp_path: Path, technique: str) -> None:
    """Catches NaN written into weights and records as if it were a result."""
    huge = trained_preset(technique, learning_rate=1e30)
    with pytest.raises(RunError, match=r"blocks? 0.*learning_rate"):
        block_loop(make_model("llama"), tmp_path, technique=huge).run()


def test_the_last_step_may_be_the_one_that_breaks(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches weights that no loss has seen: with one step the loss is that of the weights before it."""
    huge = trained_preset("br_gp", learning_rate=1e30, epochs=1, batch_size=1000)
    with pytest.raises(RunError, match=r"block 0\b.*not finite"):
        block_loop(make_model("llama"), tmp_path, technique=huge).run()
    assert not list((tmp_path / "state").glob("*.safetensors"))


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize(
    ("trainable", "moves_linears", "moves_others"),
    [("all", True, True), ("linears", True, False), ("bias_norm", False, True)],
)
def test_only_what_is_trainable_moves(
    make_model: MakeModel,
    tmp_path: Path,
    architecture: str,
    trainable: str,
    moves_linears: bool,
    moves_others: bool,
) -> None:
    """Catches `bias_norm` that trains a linear by one bit, `linears` that trains norms, and the reverse of each."""
    model, twin = make_model(architecture), make_model(architecture)
    block_loop(twin, tmp_path / "pruned").run()
    technique = trained_preset("br_gp", trainable=trainable)
    block_loop(model, tmp_path / "trained", technique=technique).run()
    moved = changed(state_of(twin.blocks), model.blocks)
    weights = {
        f"{index}.{view.parameter}" for index, views in enumerate(model.linears) for view in views.values()
    }
    # A bias in front of a softmax over keys has no gradient of its own, so only the kind is asked for.
    assert bool(moved & weights) == moves_linears
    assert bool(moved - weights) == moves_others
    if moves_linears:
        assert weights <= moved
    if moves_others:
        norms = {name for name in state_of(model.blocks) if "norm" in name or "ln_" in name}
        assert norms <= moved


def test_half_precision_is_rounded_once(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches training in bfloat16, where a step of 2e-4 of a weight is lost: the loss would not move."""
    model = make_model("llama", dtype="bfloat16")
    technique = trained_preset("br_gp", learning_rate=2e-4, epochs=8)
    rows, _ = block_loop(model, tmp_path, technique=technique).run()
    for row in rows:
        losses = row["training"][0]["epoch_losses"]
        assert all(later < earlier for earlier, later in pairwise(losses))
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}


def test_a_block_without_anything_to_train_is_an_error(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches epochs of nothing: with its norms taken away this block has no parameter of one dimension."""
    model = make_model("llama", num_blocks=1)
    model.blocks[0].input_layernorm = torch.nn.Identity()
    model.blocks[0].post_attention_layernorm = torch.nn.Identity()
    with pytest.raises(RunError, match=r"block 0.*bias_norm"):
        block_loop(model, tmp_path, technique=trained_preset("br_gp", trainable="bias_norm")).run()


@pytest.mark.parametrize("transposed", ["neither", "weights", "mask"])
def test_a_mask_is_applied_to_every_weight(transposed: str) -> None:
    """Catches pieces that are left out, and a tensor whose memory is in another order than its mask's."""
    tensor = torch.randn(257, PIECE // 128 + 1, generator=generator(0, "test"))
    mask = (torch.rand(tensor.shape, generator=generator(1, "test")) > 0.5).to(torch.uint8)
    wanted = torch.where(mask.bool(), tensor, 0.0)
    given = tensor.T.contiguous().T if transposed == "weights" else tensor.clone()
    mask_(given, mask.T.contiguous().T if transposed == "mask" else mask)
    assert torch.equal(given, wanted)


def test_weights_that_are_zero_but_kept_are_trained(make_model: MakeModel) -> None:
    """Catches masks read off as W != 0, which lose a kept weight that happens to be zero."""
    model = make_model("llama", num_blocks=1)
    tokens = some_texts().mask[0].tokens_NT
    pairs = Pairs([_store(model.embed(tokens))], [_store(block_outputs(model, tokens)[0])])
    weight = model.blocks[0].mlp.up_proj.weight
    weight[:4] = 0
    masks = {name: torch.ones(view.shape, dtype=torch.bool) for name, view in model.linears[0].items()}
    _fit_block(model, masks, pairs, trained_preset("br_gp"))
    assert weight[:4].all()


def test_losses_by_hand() -> None:
    """Catches means over the wrong axis."""
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    target = torch.tensor([[[1.0, 1.0], [3.0, 0.0]]])
    assert float(mse(student, target).mean()) == pytest.approx((0 + 1 + 9 + 4) / 4)
    assert float(relative_mse(student, target).mean()) == pytest.approx((1 / 2 + 13 / 9) / 2)
    assert float(cosine(student, target).mean()) == pytest.approx(((1 - 1 / math.sqrt(2)) + 1) / 2)


@pytest.mark.parametrize("loss", ["mse", "relative_mse", "cosine"])
def test_every_loss_trains(make_model: MakeModel, tmp_path: Path, loss: str) -> None:
    """Catches a loss without a gradient."""
    rows, _ = block_loop(make_model("llama"), tmp_path, technique=trained_preset("br_gp", loss=loss)).run()
    assert all(row["training"][0]["epoch_losses"][-1] < row["training"][0]["epoch_losses"][0] for row in rows)


@pytest.mark.parametrize("name", options("reconstruction"))
def test_every_preset_runs_and_counts_its_steps(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    """Catches a new YAML that no code can run, and a progress bar told another number of steps than there are."""
    technique = preset(name)
    short = preset(name, epochs=min(1, technique.epochs), batch_size=4)
    loop: BlockLoop = block_loop(make_model("llama"), tmp_path, technique=short)
    promised: list[int] = []
    loop.listener.window = lambda window, num_blocks, steps: promised.append(steps)  # type: ignore[method-assign]
    rows, _ = loop.run()
    assert len(rows) == 3
    steps: int = loop.listener.steps  # type: ignore[attr-defined]
    assert steps == sum(promised)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"stride": 2}, "stride"),
        ({"betas": [0.9]}, "betas"),
        ({"trainable": "norms"}, "trainable"),
        ({"loss": "mae"}, "loss"),
        ({"lr_schedule": "sometimes"}, "lr_schedule"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"epochs": -1}, "epochs"),
        ({"target_chain": "both"}, "target_chain"),
    ],
)
def test_impossible_techniques_are_refused(wrong: dict[str, Any], key: str) -> None:
    """Catches a typing slip that trains something else than was asked for."""
    with pytest.raises(ConfigError) as caught:
        preset("br", **wrong)
    assert caught.value.key == f"reconstruction.{key}"


def test_texts_of_several_lengths_cannot_be_one_batch() -> None:
    """Catches a crash in the first mixed batch, hours into a run."""
    lengths: Sequence[int] = [8, 8, 6]
    with pytest.raises(ConfigError, match="length"):
        check_lengths(lengths)
    check_lengths(lengths[:2])
