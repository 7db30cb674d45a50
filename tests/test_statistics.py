"""Input statistics: sums over tokens, however they come, and one accumulator for layers that see one input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import MakeModel
from reprune.calibration.roles import Texts
from reprune.engine.activations import Stores
from reprune.engine.chains import Chains
from reprune.engine.collecting import collecting
from reprune.engine.observing import collect
from reprune.engine.statistics import InputStatistics
from reprune.model import device
from reprune.model.device import DevicePlan
from reprune.model.linears import linears_of
from reprune.model.loading import LoadedModel
from support import random_text


@given(st.lists(st.integers(1, 40), max_size=5), st.integers(0, 1000))
def test_sums_do_not_depend_on_the_split(cuts: list[int], seed: int) -> None:
    """Catches per-batch and per-sample means, and a running average that forgets its count."""
    inputs = torch.randn(41, 5, generator=torch.Generator().manual_seed(seed))
    statistics = InputStatistics()
    for part in torch.tensor_split(inputs, sorted(set(cuts))):
        statistics.add(part[None], with_gram=True)
    exact = inputs.double()
    assert statistics.num_tokens == 41
    assert statistics.gram is not None
    torch.testing.assert_close(statistics.gram.double(), exact.T @ exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.norm.double(), exact.norm(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 4096])
def test_variance_beside_a_large_mean(batch: int) -> None:
    """Catches E[x²] − E[x]² in float32, where features of mean 10⁴ and deviation 1 have no variance left, or a wrong one."""
    rng = np.random.default_rng(0)
    mean, deviation = np.array([1e4, -1e4, 1e4, 0.0, 3.0]), np.array([1.0, 1.0, 0.0, 1.0, 0.5])
    inputs = (mean + deviation * rng.standard_normal((4096, 5))).astype(np.float32)
    # One token far from all others, as models have at the beginning of a text.
    inputs[0, 3] = 5e3
    statistics = InputStatistics()
    for part in torch.from_numpy(inputs).split(batch):
        statistics.add(part[None], with_gram=False)
    exact = inputs.astype(np.float64)
    np.testing.assert_allclose(statistics.variance.numpy(), exact.var(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(statistics.mean.numpy(), exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.norm.numpy(), np.linalg.norm(exact, axis=0), rtol=1e-6)
    assert statistics.variance.dtype == statistics.mean.dtype == statistics.norm.dtype == torch.float32


def test_a_feature_is_dead_only_if_every_token_has_it_zero() -> None:
    """Catches deadness judged by the last batch."""
    statistics = InputStatistics()
    statistics.add(torch.tensor([[1.0, 0.0, 0.0]]), with_gram=False)
    statistics.add(torch.tensor([[0.0, 0.0, 2.0]]), with_gram=False)
    assert statistics.dead.tolist() == [False, True, False]
    assert statistics.gram is None


@pytest.mark.parametrize("num_features", [191, 193, 400, 1700])
def test_a_gram_by_panels_is_whole(num_features: int) -> None:
    """Catches columns between panels, a panel's own block taken twice, and a side below the diagonal of one batch only."""
    inputs = torch.randn(9, num_features, generator=torch.Generator().manual_seed(num_features))
    statistics = InputStatistics()
    for part in inputs.split(4):
        statistics.add(part, with_gram=True)
    assert statistics.gram is not None
    assert torch.equal(statistics.gram, statistics.gram.T)
    exact = inputs.double()
    torch.testing.assert_close(statistics.gram.double(), exact.T @ exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.norm.double(), exact.norm(dim=0), rtol=1e-5, atol=1e-6)


def _inputs_of_linears(model: LoadedModel, texts: Texts) -> dict[str, Tensor]:
    """Float64 inputs [tokens, d_in] of block 0's linears over the mask texts, from plain forward passes."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs: found.setdefault(name, []).append(inputs[0].flatten(0, -2).double())

    linears = {n: m for n, m in model.blocks[0].named_modules() if isinstance(m, nn.Linear)}
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in linears.items()]
    with torch.no_grad():
        for text in texts.mask:
            model.model(input_ids=text.tokens_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("num_samples", [1, 7, 128])
@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_any_count_of_samples_in_any_batches(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_samples: int, batch: int
) -> None:
    """Catches hard-coded counts of 128, a last batch that is dropped, and texts weighted by sequence, not token."""
    model = make_model("llama", num_blocks=1)
    texts = Texts(
        mask=[random_text("long", num_sequences=num_samples, length=6), random_text("short", length=2)]
    )
    monkeypatch.setitem(device.TOKENS_A_PASS, "cpu", batch * 6)
    chains = Chains(model, texts.all, Stores(torch.float32, 32, tmp_path, on_disk=False))
    found = collect(chains, 0, chains.pruned, texts.mask, model.linears[0], True)
    for name, inputs in _inputs_of_linears(model, texts).items():
        statistics = found[name]
        assert statistics.num_tokens == 6 * num_samples + 2 * 6
        assert statistics.gram is not None
        torch.testing.assert_close(statistics.gram.double(), inputs.T @ inputs, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(statistics.norm.double(), inputs.norm(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_gram", [True, False])
def test_layers_with_one_input_share_one_accumulator(
    make_model: MakeModel, tmp_path: Path, with_gram: bool
) -> None:
    """Catches a Gram and a factorisation for each of q, k and v; and sharing with a layer that sees something else."""
    model = make_model("llama", num_blocks=1)
    texts = Texts(mask=[random_text("mask")])
    chains = Chains(model, texts.all, Stores(torch.float32, 32, tmp_path, on_disk=False))
    found = collect(chains, 0, chains.pruned, texts.mask, model.linears[0], with_gram)
    attention = [found[f"self_attn.{name}_proj"] for name in ("q", "k", "v")]
    assert attention[0] is attention[1] is attention[2]
    assert found["mlp.gate_proj"] is found["mlp.up_proj"]
    distinct = [attention[0], found["self_attn.o_proj"], found["mlp.gate_proj"], found["mlp.down_proj"]]
    assert len({id(statistics) for statistics in distinct}) == 4
    assert {statistics.num_tokens for statistics in distinct} == {6 * 12}
    if with_gram:
        first = attention[0].inverse_factor(0.01, "here")
        assert attention[2].inverse_factor(0.01, "here")[0] is first[0]


@pytest.mark.parametrize(
    ("architecture", "last"), [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("mixtral", None)]
)
def test_nothing_is_computed_behind_the_last_layer(
    make_model: MakeModel, tmp_path: Path, architecture: str, last: str | None
) -> None:
    """Catches a product that no statistic reads, and a pass that is left where a router may yet call other experts."""
    model = make_model(architecture, num_blocks=1)
    texts = Texts(mask=[random_text("mask")])
    chains = Chains(model, texts.all, Stores(torch.float32, 32, tmp_path, on_disk=False))
    views = model.linears[0]
    with collecting(views, with_gram=True) as whole, torch.no_grad():
        model.base(input_ids=texts.mask[0].tokens_NT, use_cache=False)
    ended = []
    handle = model.blocks[0].register_forward_hook(lambda module, given, output: ended.append(given[0].shape))
    found = collect(chains, 0, chains.pruned, texts.mask, views, True)
    handle.remove()
    assert (torch.Size([6, 12, 32]) in ended) == (last is None)
    assert list(found) == list(whole)
    assert last is None or last == list(views)[-1]
    for name, statistics in found.items():
        assert statistics.num_tokens == whole[name].num_tokens
        torch.testing.assert_close(statistics.gram, whole[name].gram, rtol=1e-5, atol=1e-5)


class _Twice(nn.Module):
    """A linear that is called twice with different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, hidden: Tensor, *positional: object, **keywords: object) -> Tensor:
        return self.linear(self.linear(hidden))  # type: ignore[no-any-return]


def test_a_layer_that_is_called_twice_is_seen_twice(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a pass that is left at the first call of the last layer."""
    model = make_model("llama", num_blocks=1)
    model.blocks[0] = _Twice()
    texts = Texts(mask=[random_text("mask")])
    chains = Chains(model, texts.all, Stores(torch.float32, 32, tmp_path, on_disk=False))
    found = collect(chains, 0, chains.pruned, texts.mask, linears_of(model.blocks[0]), False)
    assert found["linear"].num_tokens == 2 * 6 * 12


class _Freed(nn.Module):
    """Two linears whose inputs are temporaries: the second gets the address that the first gave back.

    Above 32 MiB glibc maps memory for each tensor and unmaps it at once, so the address is free and taken again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 1), nn.Linear(64, 1)
        self.addresses: list[int] = []

    def _own(self, layer: nn.Linear, x: Tensor) -> Tensor:
        self.addresses.append(x.data_ptr())
        return layer(x).sum()

    def forward(self, x: Tensor) -> Tensor:
        return self._own(self.a, x + 1) + self._own(self.b, x - 1)


class _InPlace(_Freed):
    """Two linears that get one tensor, changed in place between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return self._own(self.a, x) + self._own(self.b, x.sub_(2))


@pytest.mark.parametrize("block", [_Freed, _InPlace])
@torch.no_grad()
def test_one_address_later_is_not_one_input(block: type[_Freed]) -> None:
    """Catches sharing decided by address alone: memory is given back and used again, or changed in place."""
    module = block()
    inputs = [torch.randn(150_000, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    module(inputs[0])
    assert module.addresses[0] == module.addresses[1], "this allocator does not show the fault"
    with collecting(linears_of(module), with_gram=True) as found:
        for x in inputs:
            module(x)
    assert found["a"] is not found["b"]
    for name, offset in (("a", 1), ("b", -1)):
        flat = torch.cat(inputs).double() + offset
        gram = found[name].gram
        assert gram is not None
        torch.testing.assert_close(gram.double(), flat.T @ flat, rtol=1e-3, atol=1)


@torch.no_grad()
def test_hooks_are_gone_afterwards() -> None:
    """Catches hooks that stay and count every later forward pass."""
    module = nn.Sequential(nn.Linear(4, 4))
    with collecting(linears_of(module), with_gram=False) as found:
        module(torch.ones(2, 4))
    module(torch.ones(5, 4))
    assert found["0"].num_tokens == 2


class _Elsewhere:
    """Stands in for a module; where it is is all there is of it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def parameters(self) -> list[_Elsewhere]:
        return [self]

    def buffers(self) -> list[_Elsewhere]:
        return []

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)


def test_a_block_that_is_held_stays_held() -> None:
    """Catches statistics that send a block home in the middle of its pruning, whose weights are then on the host."""
    device = torch.device("cuda:0")
    plan, module = DevicePlan(device, torch.float32, 1), _Elsewhere()
    with plan.holding(module):  # type: ignore[arg-type]
        with plan.holding(module):  # type: ignore[arg-type]
            assert module.device == device
        assert module.device == device
    assert module.device == torch.device("cpu")
