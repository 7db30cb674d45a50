"""FLAP, AMP and LLM-Pruner: scores of units, one ranking of all of them, biases that make up for means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import MakeModel
from helpers import plan_of, run_tiny, state_bytes
from reprune.engine.activations import Stores
from reprune.engine.dense_pass import DensePass
from reprune.errors import ConfigError
from reprune.files import read_json
from reprune.model.biases import give_biases, told_of
from reprune.model.coupling import find_couplings
from reprune.model.loading import LoadedModel
from reprune.pipeline import run
from reprune.pruning.flap import FLAP
from reprune.pruning.wanda import Wanda
from reprune.reconstruction.bias_compensation import BiasCompensation
from reprune.sparsity.allocation import Layers
from reprune.sparsity.coupled_units import CoupledUnits
from reprune.sparsity.global_units import GlobalUnits
from support import (
    ARCHITECTURES,
    block_loop,
    block_outputs,
    layer_context,
    load_tiny,
    option,
    preset,
    random_text,
    some_texts,
)

NO_EXPERTS = [name for name in ARCHITECTURES if name not in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")]

CANNOT_TELL = {"mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "mpt", "stablelm"}
"""Architectures without a switch for some of these biases."""


@torch.no_grad()
def _inputs(model: LoadedModel, names: list[str]) -> dict[str, Tensor]:
    """What layers ('block.name') are given on the mask text in a plain forward pass, float64 [tokens, d_in]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            found[name] = inputs[0].double().reshape(-1, inputs[0].shape[-1])

        return hook

    handles = []
    for name in names:
        block, _, layer = name.partition(".")
        handles.append(model.linears[int(block)][layer].module.register_forward_pre_hook(keep(name)))
    model.model(input_ids=some_texts().mask[0].tokens_NT)
    for handle in handles:
        handle.remove()
    return found


def test_fluctuation_is_variance_times_squared_weights() -> None:
    """Catches a norm where the variance is meant, and weights that are not squared."""
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 6, generator=stream) + 3 * torch.arange(6)
    weight = torch.randn(4, 6, generator=stream)
    expected = torch.stack([weight[:, j] ** 2 * inputs[:, j].var(correction=0) for j in range(6)], dim=1)
    torch.testing.assert_close(FLAP().score(layer_context(weight, inputs)), expected, rtol=1e-4, atol=1e-4)


def test_global_units_is_the_ranking_by_hand(make_model: MakeModel) -> None:
    """Catches features standardised over units or blocks, costs that are left out, and a budget that is not kept."""
    model = make_model("llama", num_blocks=3)
    views = {f"{block}.{name}": view for block, own in enumerate(model.linears) for name, view in own.items()}
    texts = some_texts()
    dense = DensePass(
        model, texts, Layers({name: view.shape for name, view in views.items()}), FLAP(),
        CoupledUnits(scores_of="consumer"), Stores(model.plan.dtype, 32, Path("unused"), on_disk=False), 0,
    )  # fmt: skip
    sparsities = [0.2, 0.5, 0.8]
    rounds = GlobalUnits().allocate_for(dense, sparsities)

    ranked = []
    consumers = [f"{block}.{it.consumer}" for block in range(3) for it in find_couplings(model, block)]
    inputs = _inputs(model, consumers)
    for block in range(3):
        for coupling in find_couplings(model, block):
            weight = views[f"{block}.{coupling.consumer}"].weight.double()
            variance = inputs[f"{block}.{coupling.consumer}"].var(dim=0, correction=0)
            features = variance * weight.square().sum(dim=0)
            standard = (features - features.mean()) / features.std()
            for unit, columns in enumerate(coupling.columns.tolist()):
                cost = len(columns) * weight.shape[0]
                for name, rows in coupling.rows.items():
                    cost += len(rows[unit]) * views[f"{block}.{name}"].shape[1]
                ranked.append((float(standard[columns].mean()), (block, coupling.consumer), cost))
    ranked.sort(key=lambda unit: unit[0])
    total = sum(view.weight.numel() for view in views.values())
    for sparsity, shares in zip(sparsities, rounds, strict=True):
        gone: dict[tuple[int, str], int] = {}
        left = sparsity * total
        for _, owner, cost in ranked:
            units = sum(one[1] == owner for one in ranked)
            if gone.get(owner, 0) == units - 1:
                continue
            if cost > 2 * left:
                break
            gone[owner] = gone.get(owner, 0) + 1
            left -= cost
        assert abs(left) <= max(cost for *_, cost in ranked) / 2
        for block in range(3):
            for coupling in find_couplings(model, block):
                share = gone.get((block, coupling.consumer), 0) / len(coupling.columns)
                for name in [coupling.consumer, *coupling.rows]:
                    assert shares[f"{block}.{name}"] == pytest.approx(share)
    assert len(set(rounds[1].values())) > 2


def test_units_settle_on_their_counts(tmp_path: Path) -> None:
    """Catches counts of the ranking that rounding changes on their way to the masks."""
    plan, result = run_tiny(
        tmp_path, "pruner=wanda", "pattern=structured", "allocation=global_units", "sparsity=0.4", "reconstruction=none",
    )  # fmt: skip
    assert result["sparsity"]["total"] == pytest.approx(0.4, abs=0.05)
    planned = read_json(plan.folder.path / "allocation.json")["rounds"][-1]
    assert len(set(planned.values())) > 1
    assert result["sparsity"]["layers"] == pytest.approx(planned, abs=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_amp_scores_by_hand(architecture: str, tmp_path: Path) -> None:
    """Catches norms of sums over tokens, other columns than the head's, and channels weighted by their weights."""
    model = load_tiny(architecture, num_blocks=1)
    couplings = find_couplings(model, 0)
    inputs = _inputs(model, [f"0.{it.consumer}" for it in couplings])
    expected = {}
    for coupling in couplings:
        weight = model.linears[0][coupling.consumer].weight.double()
        x = inputs[f"0.{coupling.consumer}"]
        scores = []
        for columns in coupling.columns.tolist():
            if len(columns) == 1:
                scores.append(float(x[:, columns[0]].abs().mean()))
            else:
                scores.append(float((x[:, columns] @ weight[:, columns].T).abs().sum(dim=1).mean()))
        count = int(len(scores) * 0.5 + 0.5)
        expected[coupling.consumer] = sorted(sorted(range(len(scores)), key=scores.__getitem__)[count:])
    loop = block_loop(
        model, tmp_path, pruner=option("pruner", "amp"), pattern=CoupledUnits(),
        texts=some_texts(),
    )  # fmt: skip
    _, masks = loop.run()
    for coupling in couplings:
        view = model.linears[0][coupling.consumer]
        keep = view.orient(masks[0][coupling.consumer])[0][coupling.columns].all(dim=1)
        stays = keep.nonzero().flatten().tolist()
        assert stays == expected[coupling.consumer] or len(keep) == 1


def test_compensation_is_the_best_bias() -> None:
    """Catches the mean of what stays, means of the wrong inputs, and outputs that lose all their weights."""
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=stream) + torch.arange(6)
    dense = torch.randn(5, 6, generator=stream)
    keep = torch.rand(5, 6, generator=stream) > 0.5
    keep[2] = False
    layer = layer_context(dense, inputs)
    solved = BiasCompensation().solve(dense, torch.where(keep, dense, 0), keep, layer.inputs, None, "here")
    assert torch.equal(solved.weight, torch.where(keep, dense, 0))
    missing = inputs @ torch.where(keep, 0, dense).T
    expected = torch.linalg.lstsq(torch.ones(40, 1), missing).solution[0]
    assert solved.bias_change is not None
    torch.testing.assert_close(solved.bias_change, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", NO_EXPERTS)
def test_new_biases_change_nothing(architecture: str) -> None:
    """Catches biases that some module adds before it scales, and ones in linears that never read them."""
    model = load_tiny(architecture)
    tokens = random_text("mask").tokens_NT
    with torch.no_grad():
        before = model.model(input_ids=tokens).logits
        layers = [f"{block}.{name}" for block, own in enumerate(model.linears) for name in own]
        give_biases(model, layers)
        assert torch.equal(model.model(input_ids=tokens).logits, before)
        views = [view for own in model.linears for view in own.values()]
        for view in views:
            kept = view.module.bias.clone()
            view.write_bias(kept.float() + torch.linspace(-1, 1, len(kept)))
            moved = model.model(input_ids=tokens).logits
            # What all keys share is lost in the softmax, unless something turns or scales them after it.
            if not any(part in view.name for part in ("k_proj", "key")):
                assert not torch.allclose(moved, before, atol=1e-4), view.name
            view.write_bias(kept)
        assert torch.equal(model.model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("architecture", NO_EXPERTS)
def test_exports_with_new_biases_load(architecture: str, tmp_path: Path) -> None:
    """Catches an export whose biases plain transformers leaves out, and a refusal of models that can tell of them."""
    model = load_tiny(architecture)
    names = [f"{block}.{name}" for block, own in enumerate(model.linears) for name in own]
    paths = {f"{model.blocks_path}.{block}.{view.bias}" for block, own in enumerate(model.linears) for view in own.values()}  # fmt: skip
    told = told_of(model.model, paths)
    give_biases(model, names)
    assert told == (architecture not in CANNOT_TELL)
    if not told:
        return
    for own in model.linears:
        for view in own.values():
            view.write_bias(torch.linspace(-1, 1, view.shape[0]))
    model.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_text("mask").tokens_NT
    with torch.no_grad():
        expected = model.model(input_ids=tokens).logits
        torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("method", ["flap", "llm_pruner", "amp"])
def test_methods_run(tmp_path: Path, method: str) -> None:
    """Catches presets that do not go together, and a FLAP whose biases stay zero."""
    plan, result = run_tiny(tmp_path, f"method={method}", "sparsity=0.5", "export.model=true")
    assert result["sparsity"]["total"] == pytest.approx(0.5, abs=0.06)
    loaded = AutoModelForCausalLM.from_pretrained(plan.folder.path / "model")
    biases = {name: own for name, own in loaded.named_parameters() if name.endswith(".bias")}
    assert bool(biases) == (method == "flap")
    moved = {name.rpartition(".layers.")[2][2:] for name, own in biases.items() if own.any()}
    assert moved == ({"self_attn.o_proj.bias", "mlp.down_proj.bias"} if method == "flap" else set())


def test_compensation_lowers_the_error(tmp_path: Path, make_model: MakeModel) -> None:
    """Catches a bias that makes it worse, one that is not recorded, and a dense chain that got it too."""
    errors = {}
    for name in ("none", "bias_compensation"):
        model = make_model("llama")
        loop = block_loop(
            model, tmp_path / name, pruner=Wanda(), pattern=CoupledUnits(), technique=preset(name)
        )
        rows, _ = loop.run()
        errors[name] = rows[0]["after"]["calibration"]["mask"]["error"]
    assert errors["bias_compensation"] < errors["none"]
    layers = rows[0]["layers"]
    assert layers["self_attn.o_proj"]["bias_compensation"]["change_norm"] > 0
    wanted = block_outputs(make_model("llama"), some_texts().mask[0].tokens_NT)
    found = block_outputs(model, some_texts().mask[0].tokens_NT)
    for row, one, other in zip(rows, wanted, found, strict=True):
        error = float((one - other).square().mean())
        assert row["after"]["calibration"]["mask"]["error"] == pytest.approx(error, rel=1e-4)


class _Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("technique", ["br_gp", "br_gp_cr"])
def test_biases_go_on_after_a_kill(tmp_path: Path, technique: str) -> None:
    """Catches new biases that are lost in the state, or not trained, beside windows that are trained against the dense chain."""
    choices = [
        "pruner=flap", "pattern=structured", f"reconstruction={technique}",
        "+reconstruction.layerwise._target_=reprune.reconstruction.bias_compensation.BiasCompensation",
    ]  # fmt: skip
    whole, result = run_tiny(tmp_path / "whole", *choices)
    killed = plan_of(tmp_path / "killed", *choices)

    def kill(windows: int) -> None:
        if windows == 1:
            raise _Killed

    with pytest.raises(_Killed):
        run(killed, kill)
    again = run(killed)
    assert state_bytes(killed.folder.path) == state_bytes(whole.folder.path)
    assert again["metrics"] == result["metrics"]
    assert any(name.endswith("gate_proj.bias") for name in state_bytes(whole.folder.path))


@pytest.mark.parametrize(
    ("choices", "key"),
    [
        (["pruner=amp"], "pattern"),
        (["pruner=amp", "pattern=2to4"], "pattern"),
        (["pruner=amp", "pattern=structured", "allocation=global_units"], "allocation"),
        (["pruner=wanda", "allocation=global_units"], "allocation"),
        (["reconstruction=bias_compensation", "reconstruction.target_chain=dense"], "reconstruction.target_chain"),
        (["reconstruction=bias_compensation", "model.architecture=mixtral", "+model.config.num_local_experts=2"], "reconstruction"),
        (["reconstruction=bias_compensation", "model.architecture=stablelm", "export.model=true"], "export.model"),
        (["reconstruction=bias_compensation", "model.architecture=qwen2", "pattern=structured", "pruner=wanda", "export.compact=true"], "export.compact"),
        (["method=flap", "schedule=iterative"], "schedule"),
        (["pruner=wanda", "pattern=structured", "schedule=repeated"], "schedule.masks"),
        (["pruner=mask", "pruner.path=masks.safetensors", "pattern=structured"], "pattern"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path: Path, choices: list[str], key: str) -> None:
    """Catches combinations that would prune something else than was asked for, or export what cannot be loaded."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, *choices)
    assert caught.value.key == key
