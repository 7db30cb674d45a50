"""Sparsity in rounds: the formulas, the masks of every round, what a round sees, and what the earlier blocks hand on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import MakeModel
from helpers import plan_of, run_tiny, state_bytes, timeless
from reprune import pipeline
from reprune.engine import fitting
from reprune.errors import ConfigError, RunError
from reprune.pruning.contract import LayerContext, LayerShape, Pruned, Pruner, ScorePruner
from reprune.pruning.magnitude import Magnitude
from reprune.pruning.random import Random
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.reconstruction.objective import WindowObjective
from reprune.sparsity.iterative import Iterative
from reprune.sparsity.one_shot import OneShot
from reprune.sparsity.patterns import Group, KeptOfGroup, Pattern, Unstructured
from reprune.sparsity.schedule import Schedule
from support import block_loop, block_outputs, some_texts, state_of, trained_preset

State = Mapping[str, Tensor]
SHAPES = ("linear", "geometric", "cubic")
PRUNERS = [Magnitude(), Wanda(), SparseGPT(), Random()]

EVERY_PRUNER = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda it: type(it).__name__)


def _linear(rounds: int, **choices: Any) -> Iterative:
    return Iterative(rounds=rounds, shape="linear", **choices)


@given(
    shape=st.sampled_from(SHAPES), rounds=st.integers(1, 24), sparsity=st.floats(1e-6, 1, exclude_max=True)
)
def test_steps_rise_to_exactly_the_sparsity(shape: str, rounds: int, sparsity: float) -> None:
    """Catches a last round that rounding leaves short of the sparsity, which the run's record would not show."""
    steps = Iterative(rounds=rounds, shape=shape).steps(sparsity)  # type: ignore[arg-type]
    assert len(steps) == rounds
    assert steps[-1] == sparsity
    assert steps[0] > 0
    assert all(earlier < later for earlier, later in pairwise(steps))
    for number, step in enumerate(steps, start=1):
        left = (rounds - number) / rounds
        expected = {
            "linear": sparsity * number / rounds,
            "geometric": -math.expm1((1 - left) * math.log1p(-sparsity)),
            "cubic": sparsity - sparsity * left**3,
        }
        assert step == pytest.approx(expected[shape], rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", [0.2, 0.4, 0.6, 0.8]), ("cubic", [0.4625, 0.7, 0.7875, 0.8])],
)
def test_steps_by_hand(shape: Any, expected: list[float]) -> None:
    """Catches the wrong end of the cubic: most goes in the first round (0.8·(1 − (3/4)³) = 0.4625)."""
    assert list(Iterative(rounds=4, shape=shape).steps(0.8)) == pytest.approx(expected)


def test_geometric_removes_the_same_share_of_what_is_left() -> None:
    """Catches a geometric growth of the sparsity in place of the weights' decay: 50 %, 75 %, 87.5 %."""
    assert list(Iterative(rounds=3, shape="geometric").steps(0.875)) == pytest.approx([0.5, 0.75, 0.875])


def test_nothing_to_remove() -> None:
    """Catches a logarithm or a division that sparsity 0 breaks."""
    for shape in SHAPES:
        assert list(Iterative(rounds=3, shape=shape).steps(0.0)) == [0, 0, 0]  # type: ignore[arg-type]


@EVERY_PRUNER
@pytest.mark.parametrize(("technique", "masks"), [("none", "free"), ("br_gp", "monotone")])
def test_one_round_is_one_shot(
    make_model: MakeModel, tmp_path: Path, pruner: Pruner, technique: str, masks: Any
) -> None:
    """Catches random streams, orders of samples or records that a schedule changes before its second round."""
    schedules: Sequence[Schedule] = [OneShot(), Iterative(rounds=1, masks=masks)]
    states, records = [], []
    for number, schedule in enumerate(schedules):
        model = make_model("llama", num_blocks=2)
        loop = block_loop(
            model,
            tmp_path / str(number),
            pruner=pruner,
            technique=trained_preset(technique),
            schedule=schedule,
        )
        rows, masks_found = loop.run()
        states.append(state_of(model.model))
        records.append((timeless(rows), {block: list(found) for block, found in masks_found.items()}))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert records[0] == records[1]


@dataclass(frozen=True)
class _Round:
    """One call of a pruner: what it was asked and what it gave back."""

    sparsity: float
    weight: Tensor
    removed: Tensor | None
    inputs: Tensor | None
    keep: Tensor
    after: Tensor


@dataclass
class _Recorder:
    """A pruner that does what another does, and keeps every round of every layer, by 'block.name'."""

    pruner: Pruner
    rounds: dict[str, list[_Round]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.needs = self.pruner.needs

    def check(self, pattern: Pattern) -> None:
        """The other's."""
        self.pruner.check(pattern)

    def brings(
        self, layers: Mapping[str, LayerShape], pattern: Pattern, known: Collection[str]
    ) -> Mapping[str, float] | None:
        """The other's."""
        return self.pruner.brings(layers, pattern, known)

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """The other's, taken down."""
        weight = layer.weight.clone()
        pruned = self.pruner.prune(layer, pattern, sparsity)
        norm = None if layer.statistics is None else layer.statistics.norm.clone()
        told = _Round(sparsity, weight, layer.removed, norm, pruned.keep.clone(), pruned.weight.clone())
        self.rounds.setdefault(f"{layer.block}.{layer.name}", []).append(told)
        return pruned


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _check_count(keep: Tensor, pruner: Pruner, pattern: Pattern, step: float) -> None:
    """Exactly what the formulas ask for, in the group that the method and the pattern compare."""
    if isinstance(pattern, KeptOfGroup):
        removed = (~keep).reshape(-1, pattern.group).sum(dim=1)
        assert removed.unique().tolist() == [_rounded(pattern.group * step)]
    elif isinstance(pruner, Wanda):
        assert (~keep).sum(dim=1).unique().tolist() == [_rounded(keep.shape[1] * step)]
    else:
        # These matrices have fewer columns than a block of SparseGPT's.
        assert int((~keep).sum()) == _rounded(keep.numel() * step)


@EVERY_PRUNER
@pytest.mark.parametrize(
    ("pattern", "sparsity", "schedule", "expected"),
    [
        (Unstructured(), 0.7, Iterative(rounds=3), [0.7 * 19 / 27, 0.7 * 26 / 27, 0.7]),
        (KeptOfGroup(kept=2, group=4), 0.5, _linear(2), [0.25, 0.5]),
        (KeptOfGroup(kept=4, group=8), 0.5, _linear(4), [0.125, 0.25, 0.375, 0.5]),
    ],
    ids=["70%", "2to4", "4to8"],
)
def test_masks_shrink_by_exact_counts(
    make_model: MakeModel,
    tmp_path: Path,
    pruner: Pruner,
    pattern: Pattern,
    sparsity: float,
    schedule: Iterative,
    expected: list[float],
) -> None:
    """Catches weights that come back, counts that start again from the survivors, and a record of another round.

    With training between the rounds, so that a removed weight could have become anything.
    """
    recorder = _Recorder(pruner)
    model = make_model("llama", num_blocks=2)
    loop = block_loop(
        model, tmp_path, pruner=recorder, pattern=pattern, sparsity=sparsity, schedule=schedule,
        technique=trained_preset("br_gp", epochs=1),
    )  # fmt: skip
    rows, masks = loop.run()
    assert len(recorder.rounds) == 14
    for full, rounds in recorder.rounds.items():
        block, name = full.split(".", 1)
        assert [told.sparsity for told in rounds] == pytest.approx(expected)
        for told in rounds:
            _check_count(told.keep, pruner, pattern, told.sparsity)
        for earlier, later in pairwise(rounds):
            assert not (later.keep & ~earlier.keep).any(), full
            assert later.removed is not None
            assert torch.equal(later.removed, ~earlier.keep)
            assert not later.weight[~earlier.keep].any(), "a removed weight was trained"
            kept = earlier.keep
            assert not torch.equal(later.weight[kept], earlier.after[kept]), "no training between rounds"
        assert torch.equal(masks[int(block)][name], rounds[-1].keep)
        weight = model.linears[int(block)][name].weight
        assert torch.equal(weight != 0, rounds[-1].keep)
        row = rows[int(block)]["layers"][name]
        assert row["removed"] == int((~rounds[-1].keep).sum())
        assert row["planned"] == sparsity


class _Whim(ScorePruner):
    """Removes the largest weights below 40 % and the smallest above: of another mind in the second round."""

    def score(self, layer: LayerContext) -> Tensor:
        """What the largest have least of."""
        return -layer.weight.abs()

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See ScorePruner."""
        return (super() if sparsity < 0.4 else Magnitude()).prune(layer, pattern, sparsity)


class _Heedless(_Whim):
    """Removes the largest weights; those of earlier rounds are zeros to it, the smallest of all."""

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        """See ScorePruner."""
        keep = pattern.keep(self.score(layer), sparsity, Group.MATRIX)
        return Pruned(torch.where(keep, layer.weight, 0), keep)


def test_free_masks_bring_weights_back_with_their_dense_values(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a removed weight that competes as zero, or returns as zero: here every one of round one returns."""
    model = make_model("llama", num_blocks=2)
    dense = state_of(model.model)
    recorder = _Recorder(_Whim())
    schedule = _linear(2, masks="free")
    _, masks = block_loop(model, tmp_path, pruner=recorder, sparsity=0.5, schedule=schedule).run()
    for full, (first, second) in recorder.rounds.items():
        block, name = full.split(".", 1)
        weight = dense[f"model.layers.{full}.weight"]
        assert second.removed is None
        assert torch.equal(second.weight, weight)
        smallest = weight.abs().flatten().argsort()[: weight.numel() // 2]
        by_hand = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, smallest, False)
        assert torch.equal(masks[int(block)][name].flatten(), by_hand)
        assert torch.equal(model.linears[int(block)][name].weight, weight * by_hand.reshape(weight.shape))
        assert not first.keep[second.keep].all(), "nothing came back"


def test_free_masks_leave_survivors_as_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches dense values for weights that stayed: these are SparseGPT's, only the removed ones are the dense."""
    model = make_model("llama", num_blocks=2)
    dense = state_of(model.model)
    recorder = _Recorder(SparseGPT())
    block_loop(
        model, tmp_path, pruner=recorder, sparsity=0.6, schedule=Iterative(rounds=2, masks="free")
    ).run()
    for full, (first, second) in recorder.rounds.items():
        weight = dense[f"model.layers.{full}.weight"]
        assert torch.equal(second.weight, torch.where(first.keep, first.after, weight))
        assert not torch.equal(second.weight[first.keep], weight[first.keep])
    assert any((second.keep & ~first.keep).any() for first, second in recorder.rounds.values())


@pytest.mark.parametrize("masks", ["free", "monotone"])
def test_magnitude_in_rounds_is_magnitude(make_model: MakeModel, tmp_path: Path, masks: Any) -> None:
    """Catches rounds that change what they must not: without reconstruction the smallest weights stay the smallest."""
    states = []
    for number, schedule in enumerate([OneShot(), Iterative(rounds=3, masks=masks)]):
        model = make_model("llama")
        block_loop(model, tmp_path / str(number), sparsity=0.6, schedule=schedule).run()
        states.append(state_of(model.model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_method_that_does_not_heed_removed_weights_is_stopped(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Catches masks that grow again without a word under `monotone`; the layer is named, and what to set."""
    loop = block_loop(make_model("llama"), tmp_path, pruner=_Heedless(), schedule=_linear(2))
    with pytest.raises(RunError, match=r"block 0, layer self_attn.q_proj.*_Heedless.*schedule\.masks=free"):
        loop.run()
    heeding = block_loop(make_model("llama"), tmp_path / "heeding", pruner=_Whim(), schedule=_linear(2))
    assert len(heeding.run()[0]) == 3


# A Llama in plain torch, in float64, of 4 heads on 2 key-value heads.


def _normed(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / (hidden.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def _turned(heads_NATD: Tensor) -> Tensor:
    """Rotary positions: feature j and j + D/2 turn by position · 10000^(−2j/D)."""
    length, size = heads_NATD.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    left, right = heads_NATD.split(size // 2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _block(weights: State, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What enters each layer of a block, and what leaves the block; `weights` by name within it."""
    own = {name: tensor.double() for name, tensor in weights.items()}
    num, length, width = hidden.shape

    def linear(name: str, inputs: Tensor) -> Tensor:
        return inputs @ own[f"{name}.weight"].T

    def heads(name: str, inputs: Tensor) -> Tensor:
        split = linear(f"self_attn.{name}", inputs).reshape(num, length, -1, width // 4).transpose(1, 2)
        return split.repeat_interleave(4 // split.shape[1], dim=1)

    normed = _normed(hidden, own["input_layernorm.weight"])
    query, key, value = _turned(heads("q_proj", normed)), _turned(heads("k_proj", normed)), heads("v_proj", normed)  # fmt: skip
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    logits = (query @ key.transpose(-1, -2) / (width // 4) ** 0.5).masked_fill(future, -torch.inf)
    mixed = (logits.softmax(dim=-1) @ value).transpose(1, 2).reshape(num, length, width)
    hidden = hidden + linear("self_attn.o_proj", mixed)
    second = _normed(hidden, own["post_attention_layernorm.weight"])
    gate = linear("mlp.gate_proj", second)
    gated = gate / (1 + (-gate).exp()) * linear("mlp.up_proj", second)
    inputs = {f"self_attn.{name}_proj": normed for name in "qkv"}
    inputs |= {"self_attn.o_proj": mixed, "mlp.gate_proj": second, "mlp.up_proj": second, "mlp.down_proj": gated}  # fmt: skip
    return inputs, hidden + linear("mlp.down_proj", gated)


def _of_block(state: State, block: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{block}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _embedded(state: State, tokens_NT: Tensor) -> Tensor:
    return state["model.embed_tokens.weight"].double()[tokens_NT]


def _wanda(weight: Tensor, inputs: Tensor, count: int, removed: Tensor | None = None) -> Tensor:
    """Keep mask without the `count` lowest |w|·‖x‖ of each row, those in `removed` first."""
    scores = weight.double().abs() * inputs.reshape(-1, inputs.shape[-1]).square().sum(dim=0).sqrt()
    if removed is not None:
        scores[removed] = -1
    lowest = scores.argsort(dim=1)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)


def test_the_llama_by_hand_is_the_models(make_model: MakeModel) -> None:
    """Catches an oracle that computes something else than the model it judges."""
    model = make_model("llama", num_blocks=2)
    tokens, state = some_texts().mask[0].tokens_NT, state_of(model.model)
    hidden = _embedded(state, tokens)
    for block, expected in enumerate(block_outputs(model, tokens)):
        _, hidden = _block(_of_block(state, block), hidden)
        torch.testing.assert_close(hidden.float(), expected, rtol=1e-4, atol=1e-5)


def test_a_block_is_pruned_on_what_the_pruned_blocks_hand_it(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches the dense chain's inputs, or those of an earlier block pruned otherwise.

    By hand: block 0 loses its smallest half, its outputs enter block 1, Wanda ranks what enters q, k and v there. The
    engine does both with Wanda's score on block 1 only, so that block 0 owes nothing to any statistics.
    """

    class MagnitudeThenWanda(Wanda):
        def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
            return (Magnitude() if layer.block == 0 else super()).prune(layer, pattern, sparsity)

    model, texts = make_model("llama", num_blocks=2), some_texts()
    dense = state_of(model.model)
    _, masks = block_loop(model, tmp_path, texts=texts, pruner=MagnitudeThenWanda()).run()
    pruned = dict(_of_block(dense, 0))
    for name, weight in pruned.items():
        if weight.dim() == 2:
            smallest = weight.abs().flatten().argsort()[: weight.numel() // 2]
            pruned[name] = weight.flatten().index_fill(0, smallest, 0).reshape(weight.shape)
    entered = _embedded(dense, texts.mask[0].tokens_NT)
    by_chain = {
        "sparse": _block(_of_block(dense, 1), _block(pruned, entered)[1])[0],
        "dense": _block(_of_block(dense, 1), _block(_of_block(dense, 0), entered)[1])[0],
    }
    for name, inputs in by_chain["sparse"].items():
        weight = _of_block(dense, 1)[f"{name}.weight"]
        expected = _wanda(weight, inputs, weight.shape[1] // 2)
        assert torch.equal(masks[1][name], expected), name
        other = _wanda(weight, by_chain["dense"][name], weight.shape[1] // 2)
        assert not torch.equal(expected, other), "the data do not tell the chains apart"


@pytest.mark.parametrize("masks", ["monotone", "free"])
def test_every_round_has_statistics_of_its_own(make_model: MakeModel, tmp_path: Path, masks: Any) -> None:
    """Catches rounds that rank by the first round's inputs: by hand, two rounds of Wanda over two blocks."""
    model, texts = make_model("llama", num_blocks=2), some_texts()
    dense = state_of(model.model)
    _, found = block_loop(
        model, tmp_path, texts=texts, pruner=Wanda(), sparsity=0.5, schedule=_linear(2, masks=masks)
    ).run()
    hidden = _embedded(dense, texts.mask[0].tokens_NT)
    told_apart = set()
    for block in range(2):
        own = _of_block(dense, block)
        inputs, _ = _block(own, hidden)
        first = {name: _wanda(own[f"{name}.weight"], x, x.shape[-1] // 4) for name, x in inputs.items()}
        after = {**own, **{f"{name}.weight": own[f"{name}.weight"] * keep for name, keep in first.items()}}
        again, _ = _block(after, hidden)
        for name, x in again.items():
            weight, removed = own[f"{name}.weight"], ~first[name] if masks == "monotone" else None
            expected = _wanda(weight, x, x.shape[-1] // 2, removed)
            assert torch.equal(found[block][name], expected), f"block {block}, {name}"
            after[f"{name}.weight"] = weight * expected
            stale = _wanda(weight, inputs[name], x.shape[-1] // 2, removed)
            told_apart |= set() if torch.equal(expected, stale) else {name}
        _, hidden = _block(after, hidden)
    assert {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} <= told_apart
    assert "self_attn.q_proj" not in told_apart, "what enters a block does not change between its rounds"


@dataclass
class _Told:
    """The windows of a loop: how many steps were announced, how many were done."""

    announced: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    ("technique", "trainings"),
    [("br_gp", {"each_round": [3, 3, 3], "end": [1, 1, 1]}), ("br_gp_cr", {"each_round": [3, 3, 3, 1], "end": [1] * 4}),
     ("submodule", {"each_round": [6, 6, 6], "end": [2, 2, 2]})],
)  # fmt: skip
@pytest.mark.parametrize("reconstruct", ["each_round", "end"])
def test_trainings_and_their_steps(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    technique: str,
    trainings: dict[str, list[int]],
    reconstruct: Any,
) -> None:
    """Catches a round that is not trained, one that is trained on another round's mask, and a wrong progress bar."""
    sparsities: list[float] = []
    real = fitting.train

    def train(objective: WindowObjective, *rest: Any) -> Any:
        newest = objective.model.linears[objective.blocks.stop - 1]["mlp.down_proj"].weight
        sparsities.append(float(newest.eq(0).double().mean()))
        return real(objective, *rest)

    monkeypatch.setattr(fitting, "train", train)
    told = _Told()
    model = make_model("llama")
    loop = block_loop(
        model, tmp_path, sparsity=0.75, schedule=_linear(3, reconstruct=reconstruct),
        technique=trained_preset(technique, epochs=2),
    )  # fmt: skip
    listener: Any = loop.listener

    def window(window: Any, num_blocks: int, steps: int) -> None:
        told.announced.append(steps)
        told.done.append(0)

    def step() -> None:
        told.done[-1] += 1

    listener.window, listener.step = window, step
    rows, _ = loop.run()
    # Nine sequences in batches of four, twice.
    assert told.announced == [6 * count for count in trainings[reconstruct]]
    assert told.done == told.announced
    by_round = [0.25, 0.5, 0.75] if reconstruct == "each_round" else [0.75]
    parts = 2 if technique == "submodule" else 1
    expected = [share for share in by_round for _ in range(parts)] * 3
    expected += [0.75] if technique == "br_gp_cr" else []
    assert sparsities == pytest.approx(expected, abs=1e-3)
    rounds = [training.get("round", 0) for training in rows[0]["training"] if training["window"] == 0]
    numbers = range(3) if reconstruct == "each_round" else [2]
    assert rounds == [number for number in numbers for _ in range(parts)]


def test_rounds_end_otherwise_than_one_shot(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches rounds that are announced and trained, and yet all work on the final mask: masks must move with training."""
    found = []
    for number, schedule in enumerate([OneShot(), Iterative(rounds=3), Iterative(rounds=3, reconstruct="end")]):  # fmt: skip
        model = make_model("llama")
        _, masks = block_loop(
            model, tmp_path / str(number), sparsity=0.6, schedule=schedule, technique=trained_preset("br_gp")
        ).run()
        found.append(torch.cat([keep.flatten() for layers in masks.values() for keep in layers.values()]))
    one_shot, each_round, end = found
    assert not torch.equal(each_round, one_shot)
    assert torch.equal(end[: len(end) // 3], one_shot[: len(end) // 3]), "magnitude, untrained between rounds"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models made by a config lie in the test's folder."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ("pattern=2to4 schedule.rounds=2 schedule.shape=cubic", "2, 2"),
        ("pattern=2to4", "1, 2, 2, 2"),
        ("pattern=2to4 schedule.rounds=3 schedule.shape=linear", "1, 1, 2"),
        ("pattern=4to8 schedule.rounds=5 schedule.shape=linear", "1, 2, 2, 3, 4"),
    ],
)
def test_rounds_that_a_pattern_cannot_take_are_refused(tmp_path: Path, choices: str, told: str) -> None:
    """Catches rounds in which nothing is removed, which would be trained all the same."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", "schedule=iterative", *choices.split())
    assert caught.value.key == "schedule"
    for word in (f"remove {told} weights", "more in every round", "schedule=one_shot", "shape=linear"):
        assert word in caught.value.screen()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("choices", "steps"),
    [
        ("pattern=2to4 schedule.rounds=2 schedule.shape=linear", [0.25, 0.5]),
        ("pattern=2to4 schedule.rounds=1", [0.5]),
        ("pattern=4to8 schedule.rounds=4 schedule.shape=linear", [0.125, 0.25, 0.375, 0.5]),
        ("sparsity=0.8", [0.4625, 0.7, 0.7875, 0.8]),
        ("pruner=none pattern=2to4", [0.0]),
    ],
)
def test_rounds_of_a_plan(tmp_path: Path, choices: str, steps: list[float]) -> None:
    """Catches a check that refuses what works, and rounds for a pruner that removes nothing."""
    plan = plan_of(tmp_path / "out", "schedule=iterative", *choices.split())
    found = [list(set(layers.values())) for layers in plan.rounds]
    assert found == [[pytest.approx(step)] for step in steps]
    assert all(len(layers) == 21 for layers in plan.rounds)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    "wrong",
    ["schedule.rounds=0", "schedule.shape=quadratic", "schedule.reconstruct=never", "schedule.masks=frozen"],
)
def test_schedules_that_are_none_are_refused(tmp_path: Path, wrong: str) -> None:
    """Catches a slip that runs as some other schedule."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", "schedule=iterative", wrong)
    assert caught.value.key == wrong.split("=")[0]


RESUMED = {
    "cross-block": "pruner=sparsegpt pattern=2to4 schedule.rounds=2 schedule.shape=linear reconstruction=br_gp_cr",
    "at the end": "pruner=wanda reconstruction=br schedule.rounds=3 schedule.reconstruct=end schedule.masks=free",
    "solved in stages": (
        "pruner=wanda reconstruction=least_squares schedule.rounds=2 schedule.masks=free "
        "reconstruction.within_block=sequential reconstruction.target_chain=dense "
        "reconstruction.stride=1 reconstruction.window=2 reconstruction.trainable=linears"
    ),
    "some blocks": "pruner=magnitude target_blocks=1:2 schedule.rounds=2 reconstruction=br_gp_cr",
}


class _Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("case", RESUMED)
def test_a_death_after_any_window_changes_nothing(tmp_path: Path, case: str) -> None:
    """Catches rounds that a resumed run repeats, and masks or dense weights of an open block that it no longer has."""
    choices = ["model.num_blocks=2", "schedule=iterative", *RESUMED[case].split()]
    plan, result = run_tiny(tmp_path / "undisturbed", *choices)
    windows: list[int] = []
    undisturbed = (state_bytes(plan.folder.path), timeless(plan.folder.blocks()), result["metrics"], result["sparsity"])  # fmt: skip

    def die_after(last: int) -> Any:
        def after_commit(done: int) -> None:
            windows.append(done)
            if done == last:
                raise _Killed

        return after_commit

    last = 1
    while last <= max([1, *windows]):
        resumed = plan_of(tmp_path / f"killed {last}", *choices)
        with pytest.raises(_Killed):
            pipeline.run(resumed, die_after(last))
        result = pipeline.run(resumed, die_after(0))
        found = (state_bytes(resumed.folder.path), timeless(resumed.folder.blocks()), result["metrics"], result["sparsity"])  # fmt: skip
        assert found == undisturbed, f"killed after window {last}"
        last += 1
    assert last > 2


def test_rounds_change_the_run(tmp_path: Path, own_cache: None) -> None:
    """Catches a schedule that is left out of the run's identity: another run would be taken for this one."""
    choices = ["schedule=one_shot", "schedule=iterative", "schedule=iterative schedule.masks=free",
               "schedule=iterative schedule.reconstruct=end", "schedule=iterative schedule.shape=linear"]  # fmt: skip
    ids = {plan_of(tmp_path, *choice.split()).folder.id for choice in choices}
    assert len(ids) == len(choices)
