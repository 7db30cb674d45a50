"""Mixtures of experts: a view for every expert, statistics of the tokens routed to it, routers left alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from conftest import MakeModel
from reprune.engine.collecting import collecting
from reprune.engine.state import RunState
from reprune.engine.statistics import STARVED, InputStatistics
from reprune.errors import ConfigError
from reprune.model.experts import routed
from reprune.model.linears import linears_of
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import LayerContext, Pruner
from reprune.pruning.magnitude import Magnitude
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.seeding import generator
from reprune.sparsity.patterns import Group, KeptOfGroup, Pattern, Unstructured
from support import block_loop, changed, random_text, some_texts, state_of

FUSED = ("mixtral", "qwen3_moe", "gpt_oss")
EVERY = pytest.mark.parametrize("architecture", FUSED)
PRUNERS = pytest.mark.parametrize(
    "pruner", [Magnitude(), Wanda(), SparseGPT(block_size=16)], ids=lambda pruner: type(pruner).__name__
)
NUM_EXPERTS = 4


def _router(block: Any) -> Any:
    return block.mlp.router if hasattr(block.mlp, "router") else block.mlp.gate


def _starve(model: LoadedModel, expert: int = 0) -> None:
    """Give an expert the mean of the others' logits: with one expert a token it is never the highest."""
    with torch.no_grad():
        for block in model.blocks:
            for parameter in _router(block).parameters():
                others = [other for other in range(NUM_EXPERTS) if other != expert]
                parameter[expert] = parameter[others].mean(dim=0)


def _statistics(model: LoadedModel, block: int, batch: int = 6) -> dict[str, InputStatistics]:
    with collecting(model.linears[block], with_gram=True) as found:
        for tokens in random_text("mask").tokens_NT.split(batch):
            model.logits(tokens)
    return found


@EVERY
def test_views_cover_every_expert_and_nothing_else(make_model: MakeModel, architecture: str) -> None:
    """Catches an expert left out or met twice, a copy in place of a view, and a wrong orientation."""
    model = make_model(architecture)
    for block, views in zip(model.blocks, model.linears, strict=True):
        experts: Any = block.mlp.experts
        for own, d_in in (
            ("gate_up_proj", 32),
            ("down_proj", experts.down_proj.numel() // NUM_EXPERTS // 32),
        ):
            parameter = getattr(experts, own)
            mine = [view for view in views.values() if view.parameter == f"mlp.experts.{own}"]
            assert [view.name for view in mine] == [
                f"mlp.experts.{own}.{index}" for index in range(NUM_EXPERTS)
            ]
            assert {view.shape for view in mine} == {(parameter[0].numel() // d_in, d_in)}
            assert {view.stage for view in mine} == {f"mlp.experts.{own}"}
            for index, view in enumerate(mine):
                assert view.is_expert
                assert view.of(parameter).data_ptr() == parameter[index].data_ptr()
                view.write(torch.full(view.shape, float(index)))
                assert bool((view.weight == index).all())
            assert bool((parameter == torch.arange(NUM_EXPERTS)[:, None, None]).all())
        others = {name for name, view in views.items() if not view.is_expert}
        assert others == {f"self_attn.{name}_proj" for name in "qkvo"}
        assert all(views[name].stage == name for name in others)
        assert all(views[name].of(views[name].stored) is views[name].stored for name in others)


def _gated(architecture: str, experts: Any, expert: int, x: Tensor) -> Tensor:
    """The inputs of an expert's down projection, by hand."""
    weight = experts.gate_up_proj[expert].double()
    if architecture != "gpt_oss":
        gate, up = (x @ weight.T).chunk(2, dim=-1)
        return functional.silu(gate) * up
    both = x @ weight + experts.gate_up_proj_bias[expert].double()
    gate, up = both[:, 0::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)


def _matches(statistics: InputStatistics, inputs: Tensor) -> None:
    assert statistics.num_tokens == len(inputs) > 0
    assert statistics.gram is not None
    torch.testing.assert_close(statistics.gram.double(), inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.norm.double(), inputs.norm(dim=0), rtol=1e-5, atol=1e-5)
    assert statistics.notes == []


@EVERY
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_statistics_are_of_the_routed_tokens(make_model: MakeModel, architecture: str, batch: int) -> None:
    """Catches statistics over all tokens, of another expert's tokens, of outputs already weighted, lost sequences."""
    model = make_model(architecture)
    block: Any = model.blocks[1]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        seen.append((inputs[0].reshape(-1, 32).double(), output[2]))

    handle = _router(block).register_forward_hook(keep)
    found = _statistics(model, 1, batch)
    handle.remove()
    hidden, index = torch.cat([one for one, _ in seen]), torch.cat([one for _, one in seen])
    assert index.shape == (6 * 12, 2)
    for expert in range(NUM_EXPERTS):
        x = hidden[(index == expert).any(dim=1)]
        _matches(found[f"mlp.experts.gate_up_proj.{expert}"], x)
        _matches(found[f"mlp.experts.down_proj.{expert}"], _gated(architecture, block.mlp.experts, expert, x))
    assert found["self_attn.q_proj"].num_tokens == 6 * 12
    # Layers are pruned in the order in which they are found.
    assert list(found)[4:] == [name for name, view in model.linears[1].items() if view.is_expert]


def test_only_the_asked_for_views_are_watched(make_model: MakeModel) -> None:
    """Catches Grams of all experts where a few are wanted."""
    model = make_model("mixtral", num_blocks=1)
    names = ["mlp.experts.gate_up_proj.1", "mlp.experts.down_proj.2"]
    with collecting({name: model.linears[0][name] for name in names}, with_gram=False) as found:
        model.logits(random_text("mask").tokens_NT)
    assert sorted(found) == sorted(names)
    assert all(statistics.gram is None for statistics in found.values())


def test_a_call_s_tokens_by_expert(make_model: MakeModel) -> None:
    """Catches a dropped token counted for some expert, one routed twice counted once, and arguments by keyword."""
    experts: Any = make_model("mixtral", num_blocks=1).blocks[0].mlp.experts
    hidden, index = torch.arange(3.0)[:, None], torch.tensor([[0, 2], [2, 2], [NUM_EXPERTS, 0]])
    weights = torch.ones(3, 2)
    for positional, keywords in (
        ((hidden, index, weights), {}),
        ((hidden,), {"routing_weights": weights, "router_indices": index}),
        ((), {"top_k_weights": weights, "hidden_states": hidden, "top_k_index": index}),
    ):
        found = {expert: rows.flatten().tolist() for expert, rows in routed(experts, positional, keywords)}
        assert found == {0: [0.0, 2.0], 2: [0.0, 1.0, 1.0]}


@use_experts_implementation(has_gate=False, has_bias=True)
class _Ungated(nn.Module):
    """Experts of up and down projection alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 3
        self.up_proj, self.up_proj_bias = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 8))
        self.down_proj, self.down_proj_bias = (
            nn.Parameter(torch.randn(3, 4, 8)),
            nn.Parameter(torch.randn(3, 4)),
        )
        self.act_fn = nn.ReLU()


@torch.no_grad()
def test_experts_without_a_gate() -> None:
    """Catches the gate's halving applied to experts that have none, and a forgotten bias."""
    block: Any = nn.Module()
    block.experts = _Ungated(SimpleNamespace(_experts_implementation="grouped_mm"))
    views = linears_of(block)
    assert [views[f"experts.{name}.1"].shape for name in ("up_proj", "down_proj")] == [(8, 4), (4, 8)]
    x = torch.randn(10, 4)
    with collecting(views, with_gram=True) as found:
        block.experts(x, torch.ones(10, 1, dtype=torch.long), torch.ones(10, 1))
    up, bias = block.experts.up_proj[1].double(), block.experts.up_proj_bias[1].double()
    _matches(found["experts.up_proj.1"], x.double())
    _matches(found["experts.down_proj.1"], (x.double() @ up.T + bias).relu())
    assert found["experts.down_proj.0"].notes == [STARVED]


@EVERY
@PRUNERS
def test_an_expert_without_tokens_is_ranked_by_its_weights(
    make_model: MakeModel, architecture: str, pruner: Pruner
) -> None:
    """Catches all-zero scores, a division by no tokens, all features dead, and silence about it."""
    model = make_model(architecture, num_experts_per_tok=1)
    _starve(model)
    found = _statistics(model, 0)
    noted = {name for name, statistics in found.items() if statistics.notes == [STARVED]}
    names = {f"mlp.experts.{own}.0" for own in ("gate_up_proj", "down_proj")}
    assert noted == names
    for name in names:
        assert found[name].num_tokens == 0
        assert not bool(found[name].dead.any())
        weight = model.linears[0][name].weight
        layer = LayerContext(name, 0, weight, found[name], generator(0, "test"))
        pruned = pruner.prune(layer, Unstructured(), 0.5)
        size = weight.abs()
        if isinstance(pruner, Wanda):
            expected = Unstructured().keep(size, 0.5, Group.ROW)
        elif isinstance(pruner, SparseGPT):
            parts = [Unstructured().keep(part, 0.5, Group.MATRIX) for part in size.split(16, dim=1)]
            expected = torch.cat(parts, dim=1)
        else:
            expected = Unstructured().keep(size, 0.5, Group.MATRIX)
        assert torch.equal(pruned.keep, expected)
        assert int(pruned.keep.sum()) == weight.numel() // 2
        assert torch.equal(pruned.weight, torch.where(expected, weight, 0))


@PRUNERS
def test_the_loop_goes_through_with_a_starved_expert(
    make_model: MakeModel, tmp_path: Path, pruner: Pruner
) -> None:
    """Catches an error for a layer that was not called, and remarks that never reach the record."""
    model = make_model("mixtral", num_experts_per_tok=1)
    _starve(model, expert=2)
    rows, masks = block_loop(model, tmp_path, pruner=pruner).run()
    for row in rows:
        for name, layer in row["layers"].items():
            view = model.linears[row["block"]][name]
            assert int((~masks[row["block"]][name]).sum()) == layer["removed"] == view.weight.numel() // 2
            assert bool(view.weight.isfinite().all())
            assert bool(view.stored[masks[row["block"]][name]].all())
            if view.is_expert and view.index == 2:
                assert layer["notes"] == ([STARVED] if pruner.needs.any else [])


@EVERY
@PRUNERS
@pytest.mark.parametrize(
    ("pattern", "kept"),
    [(Unstructured(), 0.5), (KeptOfGroup(kept=2, group=4), 0.5), (KeptOfGroup(kept=3, group=4), 0.75)],
    ids=["unstructured", "2to4", "3to4"],
)
def test_every_expert_has_the_planned_count_and_the_rest_is_untouched(
    make_model: MakeModel, tmp_path: Path, architecture: str, pruner: Pruner, pattern: Pattern, kept: float
) -> None:
    """Catches counts that hold over all experts together only, and pruned routers, norms, biases and embeddings."""
    model = make_model(architecture, num_blocks=2)
    before = state_of(model.model)
    _, masks = block_loop(model, tmp_path, pruner=pruner, pattern=pattern, sparsity=1 - kept).run()
    pruned = set()
    for index, block in enumerate(model.blocks):
        assert set(masks[index]) == set(model.linears[index])
        for name, view in model.linears[index].items():
            keep = masks[index][name]
            assert keep.shape == view.stored.shape
            assert torch.equal(view.stored != 0, keep), name
            assert int(keep.sum()) == kept * keep.numel(), name
            if isinstance(pattern, KeptOfGroup):
                groups = view.orient(keep).unflatten(1, (-1, 4)).sum(dim=-1)
                assert bool((groups == pattern.kept).all())
        ours = {view.parameter for view in model.linears[index].values()}
        pruned |= {id(parameter) for name, parameter in block.named_parameters() if name in ours}
    names = {name for name, parameter in model.model.named_parameters() if id(parameter) in pruned}
    assert changed(before, model.model) == names
    assert not any("router" in name or "mlp.gate." in name or "bias" in name for name in names)


@EVERY
def test_state_goes_to_disk_and_back(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    """Catches masks of experts that are lost or get the shape of the whole parameter on the way."""
    model = make_model(architecture)
    _, masks = block_loop(model, tmp_path).run()
    state = RunState(tmp_path / "again")
    state.commit(1, model, range(2), range(2, 3), [], {2: {}}, masks, {})
    fresh = make_model(architecture)
    restored = state.restore(fresh)
    assert changed(state_of(model.model), fresh.model) == set()
    assert restored.masks.keys() == {2}, "those of frozen blocks stay on disk"
    for there in (state.masks(fresh), {0: masks[0], 1: masks[1], **restored.masks}):
        assert list(there) == list(masks)
        for block, layers in masks.items():
            assert list(there[block]) == list(layers)
            assert all(torch.equal(there[block][name], keep) for name, keep in layers.items())


@EVERY
def test_saved_models_load_with_transformers(
    make_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    """Catches zeros that come back to life where experts are split for the file and fused again."""
    model = make_model(architecture)
    _, masks = block_loop(model, tmp_path, pruner=SparseGPT(block_size=16)).run()
    model.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    tokens = some_texts().probes[0].tokens_NT
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model.logits(tokens))
    assert changed(state_of(model.model), loaded) == set()
    for block, layers in masks.items():
        views = linears_of(loaded.model.layers[block])
        assert all(torch.equal(views[name].stored != 0, keep) for name, keep in layers.items())


class _Listed(nn.Module):
    """A block with experts in a list, and a layer that is never called."""

    def __init__(self, calls_all: bool) -> None:
        super().__init__()
        self.calls_all = calls_all
        self.moe = nn.Module()
        self.moe.gate = nn.Linear(4, 3, bias=False)
        self.moe.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3)
        )
        self.moe.forward = self._mix
        self.unused = nn.Linear(4, 4)

    def _mix(self, x: Tensor) -> Tensor:
        index = self.moe.gate(x).argmax(dim=-1)  # type: ignore[operator]
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.moe.experts):  # type: ignore[arg-type]
            if self.calls_all or bool((index == number).any()):
                out[index == number] = expert(x[index == number])
        return out

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.moe(x)
        return x + moved


@pytest.mark.parametrize("calls_all", [True, False])
@torch.no_grad()
def test_experts_in_a_list(calls_all: bool) -> None:
    """Catches empty inputs that share one accumulator by their address, and an uncalled layer passed as an expert."""
    block = _Listed(calls_all)
    for parameter in block.moe.gate.parameters():
        parameter.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0.0, 0, 0, 0]]))
    views = linears_of(block)
    assert sorted(views) == [
        *(f"moe.experts.{number}.{layer}" for number in range(3) for layer in (0, 2)),
        "unused",
    ]
    assert [name for name, view in views.items() if not view.is_expert] == ["unused"]
    assert {view.stage for view in views.values()} == {"moe.experts.*.0", "moe.experts.*.2", "unused"}
    x = torch.randn(20, 4)
    with collecting(views, with_gram=True) as found:
        # At first one expert's tokens alone, so that two are called without any.
        block(x[x[:, 0] > 0])
        block(x)
    _matches(found["moe.experts.0.0"], torch.cat([x[x[:, 0] > 0]] * 2).double())
    _matches(found["moe.experts.1.0"], x[x[:, 0] < 0].double())
    assert found["moe.experts.2.0"].notes == found["moe.experts.2.2"].notes == [STARVED]
    assert "unused" not in found
    with collecting(views, with_gram=True) as found:
        block.unused(x)
    assert list(found) == ["unused"]


def test_a_shared_expert_as_wide_as_there_are_experts(make_model: MakeModel) -> None:
    """Catches routers told by their width alone: Qwen3-Next has 512 experts and a shared one of width 512."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 4}
    model = make_model("qwen2_moe", num_blocks=1, num_experts_per_tok=2, **sizes)
    shared = {name for name in model.linears[0] if "shared" in name}
    assert shared == {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert {"gate", "shared_expert_gate"} <= {name for name, _ in model.blocks[0].mlp.named_children()}


def test_routers_that_are_linears_are_left_alone(make_model: MakeModel) -> None:
    """Catches a pruned router where it is an nn.Linear."""
    model = make_model("phimoe", num_blocks=1, num_local_experts=4, intermediate_size=16)
    block: Any = model.blocks[0]
    assert isinstance(block.mlp.router, nn.Linear)
    assert not any("router" in name for name in model.linears[0])


def test_experts_fused_in_another_way_are_refused() -> None:
    """Catches a mixture of experts of which only the attention is pruned, reported as pruned to the target."""
    block: Any = nn.Module()
    block.attention, block.moe = nn.Linear(4, 4), nn.Module()
    block.moe.weight = nn.Parameter(torch.zeros(3, 4, 4))
    with pytest.raises(ConfigError, match=r"experts[\s\S]*fused[\s\S]*moe\.weight"):
        linears_of(block)
    stacked: Any = nn.Module()
    stacked.attention, stacked.moe, stacked.moe.mlp = nn.Linear(4, 4), nn.Module(), nn.Module()
    stacked.moe.num_experts, stacked.moe.mlp.w1 = 3, nn.Parameter(torch.zeros(3 * 8, 4))
    with pytest.raises(ConfigError, match=r"experts[\s\S]*fused[\s\S]*moe\.mlp\.w1"):
        linears_of(stacked)
    block.moe.weight = nn.Parameter(torch.zeros(3, 4))
    assert list(linears_of(block)) == ["attention"]
    convolution: Any = nn.Module()
    convolution.conv, convolution.out = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)
    assert list(linears_of(convolution)) == ["out"]
