"""Units that are pruned as a whole: heads with what they share keys and values with, channels of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import MakeModel
from reprune.errors import RunError
from reprune.model.coupling import Coupling, find_couplings
from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel
from reprune.seeding import generator
from support import ARCHITECTURES, changed, state_of

EVERY = pytest.mark.parametrize("architecture", list(ARCHITECTURES))

WITH_EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
# The tiny config says two key/value heads, which these do not know of.
WITHOUT_GROUPS = ("opt", "gpt2", "gpt_neox", "bloom", "mpt")
# falcon has one key/value head; the norms of olmo2 and olmoe span the queries of all heads, so that each sees all others.
ONE_UNIT = ("falcon", "olmo2", "olmoe")


def _heads(model: LoadedModel, architecture: str) -> tuple[int, int, int]:
    """From the config: heads, key/value heads, features a head."""
    config = model.model.config.get_text_config()
    heads = config.num_attention_heads
    sharing = {"falcon": 1, **dict.fromkeys(WITHOUT_GROUPS, heads)}
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, sharing.get(architecture) or config.num_key_value_heads, width


def _channels(model: LoadedModel, architecture: str) -> int:
    """From the config: how wide the MLP is within."""
    config = model.model.config.get_text_config()
    if architecture in ("gpt2", "bloom", "falcon", "mpt"):
        return int(4 * config.hidden_size)
    return int(config.ffn_dim if architecture == "opt" else config.intermediate_size)


@EVERY
def test_units_are_groups_of_heads_and_channels(architecture: str, make_model: MakeModel) -> None:
    """Catches heads torn apart, groups that are not seen, rows left out or counted twice, coupled experts."""
    model = make_model(architecture)
    heads, groups, width = _heads(model, architecture)
    attention, *mlp = find_couplings(model, 1)
    units = 1 if architecture in ONE_UNIT else groups
    views = model.linears[1]
    assert attention.columns.shape == (units, heads // units * width)
    # Queries of all heads, keys and values of all groups.
    per_unit = sum(rows.shape[1] for rows in attention.rows.values())
    assert per_unit == (heads + 2 * groups) * width // units
    assert len(mlp) == (architecture not in WITH_EXPERTS)
    for coupling in mlp:
        assert coupling.columns.shape == (_channels(model, architecture), 1)
        every = {name for name in views if name not in {*attention.rows, attention.consumer}}
        assert {coupling.consumer, *coupling.rows} == every
    for coupling in (attention, *mlp):
        # Here every row and column is in exactly one unit.
        for name, members in [(coupling.consumer, coupling.columns.T), *coupling.rows.items()]:
            size = views[name].shape[name == coupling.consumer]
            assert members.dtype == torch.int64
            assert members.flatten().sort().values.tolist() == list(range(size))


WORKED: dict[str, tuple[dict[str, Any], list[int], dict[str, list[int]]]] = {
    # Four heads of width 8 in two groups; a unit's second half lies behind the first in each layer.
    "llama": (
        {},
        [*range(16, 32)],
        {
            "self_attn.q_proj": [*range(16, 32)],
            "self_attn.k_proj": [*range(8, 16)],
            "self_attn.v_proj": [*range(8, 16)],
        },
    ),
    # Queries of all heads, then keys, then values.
    "phi3": (
        {},
        [*range(16, 32)],
        {"self_attn.qkv_proj": [*range(16, 32), *range(40, 48), *range(56, 64)]},
    ),
    "gpt2": ({}, [*range(8, 16)], {"attn.c_attn": [*range(8, 16), *range(40, 48), *range(72, 80)]}),
    # Query, key and value of one head after the other.
    "gpt_neox": ({}, [*range(8, 16)], {"attention.query_key_value": [*range(24, 48)]}),
    "bloom": ({}, [*range(8, 16)], {"self_attention.query_key_value": [*range(24, 48)]}),
    # Two queries, their key and their value, one group after the other.
    "falcon": (
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        [*range(16, 32)],
        {"self_attention.query_key_value": [*range(32, 64)]},
    ),
}


@pytest.mark.parametrize("architecture", list(WORKED))
def test_second_unit_by_hand(architecture: str, make_model: MakeModel) -> None:
    """Catches units whose rows belong to another head than their columns, and units in another order."""
    config, columns, rows = WORKED[architecture]
    attention = find_couplings(make_model(architecture, **config), 0)[0]
    assert attention.columns[1].tolist() == columns
    assert {name: places[1].tolist() for name, places in attention.rows.items()} == rows


def test_gate_and_up_in_one_layer(make_model: MakeModel) -> None:
    """Catches a fused layer of which only one half is found: row j of the gate and row j of up are 64 apart."""
    [_, mlp] = find_couplings(make_model("phi3"), 0)
    channels = torch.arange(64)
    assert torch.equal(mlp.columns, channels[:, None])
    assert torch.equal(mlp.rows["mlp.gate_up_proj"], torch.stack([channels, channels + 64], dim=1))


class _Block:
    """A block of a tiny model on random states: what it puts out and what one of its linears was given."""

    def __init__(self, model: LoadedModel, index: int) -> None:
        self.block = model.blocks[index]
        self.views = model.linears[index]
        states = torch.randn(1, 24, model.embed(torch.zeros(1, 24, dtype=torch.long)).shape[-1],
                             generator=generator(0, "states"))  # fmt: skip
        call = model.call(index, 1, 24)
        self.run: Callable[[], Tensor] = lambda: call.run(self.block, states)

    @torch.no_grad()
    def output(self) -> Tensor:
        return self.run().clone()

    @torch.no_grad()
    def given(self, name: str) -> Tensor:
        """[tokens, features]."""
        kept = []
        module = self.block.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda module, given: kept.append(given[0].clone()))
        try:
            self.run()
        finally:
            handle.remove()
        return kept[-1].flatten(0, -2)


def _change_rows(view: LinearView, rows: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    weight = view.weight.clone()
    weight[rows] = change(weight[rows])
    view.write(weight)
    if view.module.bias is not None:
        view.module.bias[rows] = change(view.module.bias[rows])


@EVERY
@torch.no_grad()
def test_rows_do_not_matter_without_their_columns(architecture: str, make_model: MakeModel) -> None:
    """Catches rows that something outside their unit reads: the real block would put out something else."""
    model = make_model(architecture)
    at = _Block(model, 1)
    fresh = state_of(at.block)
    for coupling in find_couplings(model, 1):
        at.block.load_state_dict(fresh)
        whole = at.output()
        consumer = at.views[coupling.consumer]
        weight = consumer.weight.clone()
        weight[:, coupling.columns[-1]] = 0
        consumer.write(weight)
        without_columns = at.output()
        for name, rows in coupling.rows.items():
            _change_rows(at.views[name], rows[-1], torch.zeros_like)
        assert torch.equal(at.output(), without_columns)
        assert not torch.equal(whole, without_columns)


@EVERY
@torch.no_grad()
def test_rows_reach_all_columns_of_their_unit_and_no_others(architecture: str, make_model: MakeModel) -> None:
    """Catches units that are torn apart or thrown together, in the real block with its own weights."""
    model = make_model(architecture)
    at = _Block(model, 1)
    stream = generator(0, "noise")
    for coupling in find_couplings(model, 1):
        before = at.given(coupling.consumer)
        for name, rows in coupling.rows.items():
            fresh = state_of(at.block)
            _change_rows(at.views[name], rows[-1], lambda old: old + torch.randn(old.shape, generator=stream))
            differs = (at.given(coupling.consumer) != before).any(dim=0)
            assert differs.nonzero().flatten().tolist() == coupling.columns[-1].tolist()
            at.block.load_state_dict(fresh)


def _same(one: list[Coupling], other: list[Coupling]) -> bool:
    return all(
        first.submodule == second.submodule
        and first.consumer == second.consumer
        and torch.equal(first.columns, second.columns)
        and first.rows.keys() == second.rows.keys()
        and all(torch.equal(rows, second.rows[name]) for name, rows in first.rows.items())
        for first, second in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_models_own_weights_hide_nothing(architecture: str, make_model: MakeModel) -> None:
    """Catches connections sought in weights that are pruned or dead, in half precision, and a model that is changed."""
    expected = find_couplings(make_model(architecture), 0)
    model = make_model(architecture, dtype="bfloat16")
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        for name, parameter in model.blocks.named_parameters():
            if name.endswith("fc1.bias"):
                parameter.fill_(-100)
    before = state_of(model.model)
    with torch.no_grad():
        found = find_couplings(model, 0)
    assert _same(found, expected)
    assert not changed(before, model.model)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_no_state_of_random_numbers_is_used_or_moved(make_model: MakeModel) -> None:
    """Catches draws from torch's own stream, which would make runs depend on what was asked before."""
    first = make_model("llama")
    before = torch.get_rng_state()
    found = find_couplings(first, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert _same(find_couplings(make_model("llama"), 0), found)


def test_blocks_that_are_alike_share_what_was_found(make_model: MakeModel) -> None:
    """Catches a search in every block, and one block's units given to a block of other shapes."""
    model = make_model("llama")
    model.blocks[2].mlp = _Gated(12)
    first, second, third = (find_couplings(model, block) for block in range(3))
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert first is not second
    assert third[1].columns.shape == (12, 1)
    assert first[1].columns.shape == (64, 1)


class _Gated(nn.Module):
    """An MLP like llama's, of another width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(32, width)
        self.up = nn.Linear(32, width)
        self.down = nn.Linear(width, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


class _LowRank(_Gated):
    """Its gate is a product of two linears, and so is its last one if `last`."""

    def __init__(self, last: bool) -> None:
        super().__init__(12)
        self.gate = nn.Sequential(nn.Linear(32, 5), nn.Linear(5, 12))
        if last:
            self.down = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 32))


def test_ranks_are_the_units_of_a_product(make_model: MakeModel) -> None:
    """Catches units that are joined through a matrix product: each channel reaches each rank, but through a linear."""
    model = make_model("llama")
    model.blocks[0].mlp = _LowRank(last=True)
    [_, mlp] = find_couplings(model, 0)
    assert mlp.consumer == "mlp.down.1"
    assert mlp.columns.tolist() == [[rank] for rank in range(6)]
    assert {name: rows.tolist() for name, rows in mlp.rows.items()} == {"mlp.down.0": mlp.columns.tolist()}


def test_the_first_factor_of_a_product_has_no_rows(make_model: MakeModel) -> None:
    """Catches channels joined by the first factor of their gate, which reaches all of them through the second."""
    model = make_model("llama")
    model.blocks[0].mlp = _LowRank(last=False)
    [_, mlp] = find_couplings(model, 0)
    channels = [[channel] for channel in range(12)]
    rows = {name: places.tolist() for name, places in mlp.rows.items()}
    assert rows == {"mlp.gate.1": channels, "mlp.up": channels}


class _Chain(_Gated):
    """What `up` puts out is used as it is, and is gated by what further linears make of all of it."""

    def __init__(self, *widths: int) -> None:
        super().__init__(4)
        steps = [4, *widths, 4]
        self.gate = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(steps)))

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        return self.down(up * self.gate(up))


@pytest.mark.parametrize(
    ("widths", "last"), [((), "mlp.gate.0"), ((3,), "mlp.gate.1"), ((3, 2), "mlp.gate.2")]
)
def test_rows_are_joined_with_those_they_reach_through_linears(
    widths: tuple[int, ...], last: str, make_model: MakeModel
) -> None:
    """Catches channels taken for units of their own although each of them gates all others."""
    model = make_model("llama")
    model.blocks[0].mlp = _Chain(*widths)
    [_, mlp] = find_couplings(model, 0)
    whole = [[0, 1, 2, 3]]
    assert mlp.columns.tolist() == whole
    assert {name: rows.tolist() for name, rows in mlp.rows.items()} == {"mlp.up": whole, last: whole}


class _Uneven(_Gated):
    """Its first two features are normalised together, the third stands alone."""

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        return self.down(torch.cat([functional.softmax(up[..., :2], dim=-1), up[..., 2:]], dim=-1))


class _Twice(_Gated):
    """Each channel is multiplied with what its neighbour was in another call of the same linear, in place."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = functional.relu_(self.up(hidden)).roll(1, dims=-1)
        return self.down(self.up(hidden).mul_(gate))


def test_every_call_of_a_linear_counts(make_model: MakeModel) -> None:
    """Catches calls that replace each other, and activations in place, which torch forbids on a leaf."""
    model = make_model("llama")
    model.blocks[0].mlp = _Twice()
    [_, mlp] = find_couplings(model, 0)
    assert mlp.columns.tolist() == mlp.rows["mlp.up"].tolist() == [[0, 1, 2, 3]]
    assert mlp.rows.keys() == {"mlp.up"}


class _TokensFirst(_Gated):
    """Its linears are given [tokens, sequences, features]."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.transpose(0, 1)).transpose(0, 1)


def test_tokens_before_sequences_are_refused(make_model: MakeModel) -> None:
    """Catches sequences mixed up with tokens, which would mix up the columns that they ask for."""
    model = make_model("llama")
    model.blocks[0].mlp = _TokensFirst()
    with pytest.raises(RunError, match=r"mlp in block 0 cannot .* in which sequences do not come first"):
        find_couplings(model, 0)


class _Alone(nn.Module):
    """One linear, which no other reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(32, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.only(functional.silu(hidden))


def test_units_of_several_sizes_are_refused(make_model: MakeModel) -> None:
    """Catches tables of units that have holes; the message must name the model and the submodule."""
    model = make_model("llama")
    model.blocks[0].mlp = _Uneven()
    with pytest.raises(RunError, match=r"tiny: mlp in block 0 cannot be pruned by units: .* between 1 and 2"):
        find_couplings(model, 0)


def test_a_submodule_of_one_linear_has_no_units(make_model: MakeModel) -> None:
    """Catches units without rows."""
    model = make_model("llama")
    model.blocks[0].mlp = _Alone()
    [attention] = find_couplings(model, 0)
    assert attention.submodule == "self_attn"
