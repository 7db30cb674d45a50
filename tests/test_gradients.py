"""Gradients block by block against autograd of the whole model, and the scores that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import plan_of, run_tiny
from reprune.calibration.source import TextSet
from reprune.engine.activations import Stores
from reprune.engine.chains import Chains
from reprune.engine.gradients import ModelGradients, block_gradients
from reprune.errors import ConfigError
from reprune.model.loading import LoadedModel
from reprune.pruning.channel_permutation import spread_channels
from reprune.pruning.d_pruner import DPruner
from reprune.pruning.fisher import Fisher
from reprune.pruning.gblm import GBLM
from reprune.pruning.ria import RIA
from reprune.pruning.taylor import Taylor
from reprune.pruning.wanda_plus_plus import WandaPlusPlus
from reprune.run_folder import RunFolder
from reprune.sparsity.patterns import KeptOfGroup, Unstructured
from support import ARCHITECTURES, layer_context, load_tiny, random_text


def _stores(model: LoadedModel, folder: Path, *, on_disk: bool = False) -> Stores:
    return Stores(model.plan.dtype, model.model.config.get_text_config().hidden_size, folder, on_disk)


def _made(
    model: LoadedModel, texts: Sequence[TextSet], folder: Path, *, on_disk: bool = False
) -> ModelGradients:
    gradients = ModelGradients(folder / "gradients")
    gradients.make(model, texts, model.linears, _stores(model, folder / "activations", on_disk=on_disk))
    return gradients


def _whole(model: LoadedModel, texts: Sequence[TextSet]) -> dict[str, list[Tensor]]:
    """Of each sequence alone, by autograd through the whole model: [d_out, d_in] by full name of a layer."""
    found: dict[str, list[Tensor]] = {}
    parameters = {
        f"{block}.{path}": parameter.requires_grad_(True)
        for block, module in enumerate(model.blocks)
        for path, parameter in module.named_parameters()
    }
    for text in texts:
        for tokens in text.tokens_NT:
            logits = model.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits.float(), tokens[1:])
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            by_path = dict(zip(parameters, gradients, strict=True))
            for block, views in enumerate(model.linears):
                for name, view in views.items():
                    whole = by_path[f"{block}.{view.parameter}"]
                    one = torch.zeros(view.shape) if whole is None else view.orient(view.of(whole))
                    found.setdefault(f"{block}.{name}", []).append(one)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    """Catches a block with another's arguments, a norm or head left out, gradients summed before they are squared."""
    model = load_tiny(architecture)
    texts = [random_text("one", num_sequences=2), random_text("two", num_sequences=1, length=9)]
    gradients = _made(model, texts, tmp_path)
    expected = _whole(model, texts)
    for block, views in enumerate(model.linears):
        found = gradients.of(block)
        assert set(found) == set(views)
        for name, each in found.items():
            whole = torch.stack(expected[f"{block}.{name}"])
            scale = float(whole.abs().max()) + 1e-12
            torch.testing.assert_close(each.mean / scale, whole.mean(dim=0) / scale, rtol=1e-3, atol=1e-4)
            squares = whole.square().mean(dim=0)
            torch.testing.assert_close(each.mean_square / scale**2, squares / scale**2, rtol=1e-3, atol=1e-4)
            assert each.num_sequences == 3
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_stores_on_disk_and_half_precision_change_nothing_but_rounding(tmp_path: Path) -> None:
    """Catches gradients that vanish in the model's half precision, and files of activations that are left behind."""
    texts = [random_text("one", num_sequences=2)]
    plain = _made(load_tiny(), texts, tmp_path / "plain")
    on_disk = _made(load_tiny(), texts, tmp_path / "disk", on_disk=True)
    half = _made(load_tiny(dtype="bfloat16"), texts, tmp_path / "half")
    for block in range(3):
        for name, each in plain.of(block).items():
            assert torch.equal(each.mean_square, on_disk.of(block)[name].mean_square)
            alike = nn.functional.cosine_similarity(
                each.mean.flatten(), half.of(block)[name].mean.flatten(), dim=0
            )
            assert float(alike) > 0.97
    assert not list((tmp_path / "disk" / "activations").glob("*"))


def test_packed_documents_have_their_own_loss(tmp_path: Path) -> None:
    """Catches a first token that is predicted from another document."""
    model = load_tiny()
    text = random_text("one", num_sequences=1, length=10)
    places = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = replace(text, positions_NT=places)
    gradients = _made(model, [packed], tmp_path).of(0)
    name, view = next(iter(model.linears[0].items()))
    parameter = model.blocks[0].get_parameter(view.parameter).requires_grad_(True)
    losses = []
    for part in (text.tokens_NT[:, :4], text.tokens_NT[:, 4:]):
        logits = model.model(input_ids=part, use_cache=False).logits[0, :-1]
        losses += list(nn.functional.cross_entropy(logits, part[0, 1:], reduction="none"))
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), [parameter])
    torch.testing.assert_close(gradients[name].mean, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_regional_gradients_are_those_of_the_blocks_output(architecture: str, tmp_path: Path) -> None:
    """Catches the norm of a batch in place of each sequence's, and the squares of a sum."""
    model = load_tiny(architecture)
    text = random_text("one", num_sequences=3)
    chains = Chains(model, [text], _stores(model, tmp_path))
    found = block_gradients(chains, 0, chains.dense[0], [text], model.linears[0])
    squares = {name: torch.zeros(view.shape) for name, view in model.linears[0].items()}
    for row in range(3):
        states = chains.dense[0][text.key].states_NTH[row : row + 1]
        parameters = {path: it.requires_grad_(True) for path, it in model.blocks[0].named_parameters()}
        output = model.call(0, 1, states.shape[1]).run(model.blocks[0], states)
        grads = torch.autograd.grad(
            output.square().sum().sqrt(), list(parameters.values()), allow_unused=True
        )
        by_path = dict(zip(parameters, grads, strict=True))
        for name, view in model.linears[0].items():
            whole = by_path[view.parameter]
            if whole is not None:
                squares[name] += view.orient(view.of(whole)).square() / 3
    for name, expected in squares.items():
        torch.testing.assert_close(found[name].mean_square, expected, rtol=1e-3, atol=1e-6)


def test_scores_by_hand() -> None:
    """Catches a root, a square or a normalisation that is missing from a formula."""
    stream = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(2, 3, generator=stream), torch.randn(7, 3, generator=stream)
    layer = layer_context(weight, inputs)
    loss, regional = layer.loss_gradients, layer.regional_gradients
    norm = [sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5 for j in range(3)]
    gram = 2 / 7 * (inputs.double().T @ inputs.double())
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(3))
    expected = {name: torch.zeros(2, 3) for name in ("ria", "snip", "fisher", "gblm", "wanda", "d")}
    for i in range(2):
        for j in range(3):
            w, g = float(weight[i, j]), float(loss.mean[i, j])
            g2, b2 = float(loss.mean_square[i, j]), float(regional.mean_square[i, j])
            by_row = abs(w) / float(weight[i].abs().sum())
            by_column = abs(w) / float(weight[:, j].abs().sum())
            expected["ria"][i, j] = (by_row + by_column) * norm[j] ** 0.5
            expected["snip"][i, j] = abs(w * g)
            expected["fisher"][i, j] = w**2 * g2 / 2
            expected["gblm"][i, j] = abs(w) * (norm[j] + 100 * (5 * g2) ** 0.5)
            expected["wanda"][i, j] = abs(w) * (norm[j] / 5**0.5 + 100 * b2**0.5)
            general = w**2 / (2 * float(inverse[j, j]))
            tilted = g * (1 + 2 * 3.0 * 0.5**2 * general * g2) * w
            expected["d"][i, j] = abs(tilted + tilted**2 / 2)
    pruners = {
        "ria": RIA(), "snip": Taylor(), "fisher": Fisher(), "gblm": GBLM(), "wanda": WandaPlusPlus(),
        "d": DPruner(regularisation=3.0, step=0.5),
    }  # fmt: skip
    for name, pruner in pruners.items():
        torch.testing.assert_close(pruner.score(layer), expected[name], rtol=1e-4, atol=1e-6)


def test_taylor_predicts_what_a_small_weight_costs(tmp_path: Path) -> None:
    """Catches gradients that are of another loss than the one that rises."""
    model, text = load_tiny(), random_text("one", num_sequences=2)
    gradients = _made(model, [text], tmp_path).of(1)

    def loss() -> float:
        total = 0.0
        for tokens in text.tokens_NT:
            logits = model.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits.double(), tokens[1:]))
        return total / 2

    name = next(iter(model.linears[1]))
    view = model.linears[1][name]
    place = divmod(int(gradients[name].mean.abs().argmax()), view.shape[1])
    before, step = loss(), 1e-2
    with torch.no_grad():
        view.weight[place] += step
    assert loss() - before == pytest.approx(step * float(gradients[name].mean[place]), rel=0.05)


@pytest.mark.parametrize("compare", ["row", "matrix"])
def test_what_a_score_is_compared_with(compare: str) -> None:
    """Catches an option that is read and has no effect."""
    weight = torch.tensor([[10.0, 20.0], [1.0, 2.0]])
    layer = layer_context(weight, torch.ones(3, 2))
    even = replace(
        layer, gradients=replace(layer.loss_gradients, mean_square=torch.ones(2, 2), mean=torch.ones(2, 2))
    )
    for kind in (Fisher, Taylor):
        keep = kind(compare=compare).prune(even, Unstructured(), 0.5).keep
        assert keep.tolist() == (
            [[False, True], [False, True]] if compare == "row" else [[True, True], [False, False]]
        )


def test_permuted_channels_keep_more_of_the_score() -> None:
    """Catches an order that puts the strong channels together, and a mask left in the order of the groups."""
    stream = torch.Generator().manual_seed(0)
    # Strong channels side by side: without another order most of them go.
    weight, inputs = torch.randn(16, 32, generator=stream), torch.randn(64, 32, generator=stream)
    inputs[:, :16] *= 100
    layer = layer_context(weight, inputs)
    pattern = KeptOfGroup(kept=2, group=4)
    scores = RIA().score(layer)
    plain, permuted = (RIA(permute=on).prune(layer, pattern, 0.5) for on in (False, True))
    assert float(scores[permuted.keep].sum()) > 1.1 * float(scores[plain.keep].sum())
    assert int(permuted.keep.sum()) == 16 * 16
    assert torch.equal(permuted.weight, torch.where(permuted.keep, weight, 0))
    # In the order in which channels were spread every group keeps two.
    order = spread_channels(scores.sum(dim=0), 4)
    assert sorted(order.tolist()) == list(range(32))
    assert (permuted.keep[:, order].reshape(-1, 4).sum(dim=1) == 2).all()
    ranks = scores.sum(dim=0).argsort(descending=True).argsort()
    assert all(
        sorted((ranks[order[start : start + 4]] // 8).tolist()) == [0, 1, 2, 3] for start in range(0, 32, 4)
    )


@pytest.mark.parametrize("pruner", ["snip", "fisher", "gblm", "d_pruner", "wanda_plus_plus"])
def test_a_run_with_gradients(pruner: str, tmp_path: Path) -> None:
    """Catches gradients that are asked for and not there, and files of them that a finished run keeps."""
    plan, result = run_tiny(tmp_path, f"pruner={pruner}", "reconstruction=br_gp", "sparsity=0.4")
    assert result["sparsity"]["total"] == pytest.approx(0.4, abs=0.01)
    assert not (plan.folder.state / "gradients").exists()
    assert result["seconds"]["gradients"] > 0


def test_a_domains_text_is_a_part_of_the_mask_data(tmp_path: Path) -> None:
    """Catches a name that is taken for another text, or gradients on all of them in silence."""
    with pytest.raises(ConfigError, match="gradients"):
        run_tiny(tmp_path, "pruner=d_pruner", "pruner.domain=law")


def test_wandas_regional_optimisation_chooses_anew(tmp_path: Path) -> None:
    """Catches rounds that only prune once, and a mask that is held although weights were trained in between."""
    plan, _ = run_tiny(
        tmp_path, "pruner=wanda_plus_plus", "schedule=repeated", "schedule.rounds=3", "reconstruction=regional",
        "reconstruction.learning_rate=1e-2", "pattern=2to4",
    )  # fmt: skip
    rows = RunFolder(plan.folder.path).blocks()
    assert [told.get("round", 0) for told in rows[0]["training"]] == [0, 1, 2]
    assert {layer["measured"] for row in rows for layer in row["layers"].values()} == {0.5}


def test_gradients_rank_over_all_layers_too(tmp_path: Path) -> None:
    """Catches gradients that are taken only after the sparsities are known: SNIP ranks over all layers."""
    plan, result = run_tiny(tmp_path, "pruner=snip", "allocation=global", "reconstruction=none")
    shares = set(result["sparsity"]["layers"].values())
    assert len(shares) > 3
    assert result["sparsity"]["total"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ConfigError, match="gradients of blocks"):
        plan_of(tmp_path, "pruner=wanda_plus_plus", "allocation=global")
    assert plan.needs.gradients


def test_gradients_go_no_further_back_than_they_are_wanted(tmp_path: Path) -> None:
    """Catches blocks that are gone through for nothing, and layers that are not to be pruned."""
    model, text = load_tiny(), random_text("one", num_sequences=1)
    gradients = ModelGradients(tmp_path / "gradients")
    name = next(iter(model.linears[2]))
    gradients.make(model, [text], [{}, {}, {name: model.linears[2][name]}], _stores(model, tmp_path))
    assert set(gradients.of(2)) == {name}
    assert not (tmp_path / "gradients" / "1.safetensors").exists()


def test_blocks_that_stay_dense_have_no_gradients(tmp_path: Path) -> None:
    """Catches a file without tensors, which cannot be read, for blocks behind those that are pruned."""
    _, result = run_tiny(tmp_path, "pruner=snip", "target_blocks=0:2", "reconstruction=none")
    assert {name.partition(".")[0] for name in result["sparsity"]["layers"]} == {"0", "1"}


@pytest.mark.parametrize(
    "more",
    [["refine=sparse_swaps"], ["schedule=iterative", "schedule.rounds=2", "schedule.shape=linear"]],
    ids=["refine", "rounds"],
)
def test_nothing_goes_on_with_permuted_groups(more: list[str], tmp_path: Path) -> None:
    """Catches swaps and rounds that leave a mask with N:M in no order of channels."""
    with pytest.raises(ConfigError) as refused:
        plan_of(tmp_path, "pruner=ria", "pruner.permute=true", "pattern=2to4", *more)
    assert refused.value.key == "pruner.permute"
    plan_of(tmp_path, "pruner=ria", "pruner.permute=true", "pattern=2to4")
