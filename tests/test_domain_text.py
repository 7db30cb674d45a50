"""Statistics of one part of the mask data and gradients of another, against hooks and autograd on the parts' own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from helpers import plan_of, run_tiny
from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.engine.activations import Stores
from reprune.engine.dense_pass import DensePass
from reprune.errors import ConfigError
from reprune.identity import canonical
from reprune.model.loading import LoadedModel, load_model
from reprune.pruning.contract import LayerContext, Needs, Pruned
from reprune.pruning.d_pruner import DPruner
from reprune.pruning.wanda import Wanda
from reprune.reconstruction.layerwise import Layerwise, Solved
from reprune.rounds import check_gradient_text
from reprune.sparsity.allocation import Layers
from reprune.sparsity.patterns import Pattern, Unstructured
from support import block_loop, load_tiny, preset, random_text

GENERAL, MORE, LAW = (
    random_text(name, num_sequences=count) for name, count in (("general", 4), ("more", 2), ("law", 3))
)


OF_LAW = (
    "pruner=d_pruner", "reconstruction=none", "calibration=mixture",
    "calibration.num_sequences=null", "calibration.parts.web=null", "calibration.parts.generated=null",
    "+calibration@calibration.parts.general=vocabulary", "calibration.parts.general.num_sequences=5",
    "+calibration@calibration.parts.law=vocabulary", "calibration.parts.law.num_sequences=2",
    "calibration.parts.law.set=1",
)  # fmt: skip


def _grams(model: LoadedModel, texts: Sequence[TextSet], block: int = 0) -> dict[str, Tensor]:
    """Σ x xᵀ of the inputs of a block's layers, by hooks on the whole model."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            found[name] = found.get(name, 0) + x.T @ x

        return add

    views = model.linears[block].items()
    handles = [view.module.register_forward_pre_hook(hook(name)) for name, view in views]
    with torch.no_grad():
        for text in texts:
            model.model(input_ids=text.tokens_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@dataclass(kw_only=True)
class _Apart(Wanda):
    """Wanda on all text but the law's, which keeps what it was given."""

    needs: ClassVar[Needs] = Needs(norm=True, gram=True, statistics_without="law")

    def __post_init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def prune(self, layer: LayerContext, pattern: Pattern, sparsity: float) -> Pruned:
        assert layer.inputs.gram is not None
        self.seen[f"{layer.block}.{layer.name}"] = layer.inputs.gram.clone()
        return super().prune(layer, pattern, sparsity)


@dataclass(kw_only=True)
class _Refining:
    """A refinement that leaves the mask and keeps what it was given."""

    needs: ClassVar[Needs] = Needs(norm=True)

    def __post_init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def refine(self, layer: LayerContext, keep: Tensor, pattern: Pattern) -> Tensor:
        self.seen[f"{layer.block}.{layer.name}"] = layer.inputs.sum_squares.clone()
        return keep


@dataclass
class _Solving(Layerwise):
    """In the place of least squares: keeps the Gram that it would solve with."""

    name: ClassVar[str] = "solving"
    reads_gram: ClassVar[bool] = True
    writes_bias: ClassVar[bool] = False
    paired: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def solve(
        self, dense: Tensor, pruned: Tensor, keep: Tensor, statistics: Any, pairs: Any, place: str
    ) -> Solved:
        self.seen[place] = statistics.gram.clone()
        return Solved(pruned)


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "solved_on", [[GENERAL, MORE, LAW], [GENERAL, MORE], [LAW]], ids=["all", "general", "law"]
)
def test_who_reads_which_text(tmp_path: Path, solved_on: list[TextSet]) -> None:
    """Catches a domain's text in the pruner's statistics, and those in the place of the solver's or the refinement's."""
    model = load_tiny()
    every = [GENERAL, MORE, LAW]
    mask, solved, read = (_grams(model, texts) for texts in (every, solved_on, [GENERAL, MORE]))
    pruner, refining, solving = _Apart(), _Refining(), _Solving()
    technique = replace(preset("least_squares"), layerwise=solving)
    texts = Texts(mask=every, reconstruction=solved_on, probes=[random_text("probe", "probe")])
    loop = block_loop(model, tmp_path, texts=texts, pruner=pruner, technique=technique)
    replace(loop, pruning=replace(loop.pruning, refinement=refining)).run()
    for name, gram in read.items():
        _same(pruner.seen[f"0.{name}"], gram)
        _same(solving.seen[f"block 0, layer {name}"], solved[name])
        _same(refining.seen[f"0.{name}"], mask[name].diagonal())
        assert not torch.allclose(gram, mask[name], rtol=0.05)


def test_without_a_name_nothing_changes(tmp_path: Path) -> None:
    """Catches a second pass, or a text left out, where no part is named."""
    model = load_tiny()
    pruner = _Apart()
    expected = _grams(model, [GENERAL, MORE])
    block_loop(model, tmp_path, texts=Texts(mask=[GENERAL, MORE]), pruner=pruner).run()
    for name, gram in expected.items():
        _same(pruner.seen[f"0.{name}"], gram)


def test_an_allocation_reads_what_its_score_does(tmp_path: Path) -> None:
    """Catches a global ranking by scores on other text than the masks are chosen on."""
    model = load_tiny()
    names = [f"{block}.{name}" for block, views in enumerate(model.linears) for name in views]
    shapes = {name: model.linears[int(name[0])][name[2:]].shape for name in names}
    stores = Stores(model.plan.dtype, model.model.config.hidden_size, tmp_path, False)
    view = DensePass(model, Texts(mask=[GENERAL, LAW]), Layers(shapes), Wanda(), Unstructured(), stores, 0)
    for without, texts in ((None, [GENERAL, LAW]), ("law", [GENERAL])):
        found = next(iter(view.visit(gram=True, without=without))).layers
        for name, gram in _grams(model, texts).items():
            _same(found[f"0.{name}"].inputs.gram, gram)


@pytest.mark.parametrize(
    ("parts", "accepted"),
    [(["law"], False), (["web"], False), (["web", "law"], True), (["web", "law", "more"], True)],
    ids=str,
)
def test_a_domain_needs_other_text_beside_it(parts: list[str], accepted: bool) -> None:
    """Catches a general importance of the domain's own text, or of none."""
    requests: Any = [SimpleNamespace(name=name, use="mask") for name in parts]
    requests.append(SimpleNamespace(name="law", use="reconstruction"))
    if accepted:
        check_gradient_text(DPruner(domain="law").needs, requests)
        return
    with pytest.raises(ConfigError) as refused:
        check_gradient_text(DPruner(domain="law").needs, requests)
    assert refused.value.key == "pruner"
    check_gradient_text(DPruner().needs, requests)


def test_runs_with_a_domain_are_others_now() -> None:
    """Catches a run with H of all text that passes for one with H of the general parts, and an id that changed for nothing."""
    plain = DPruner()
    assert canonical(plain) == {"class": "DPruner", **asdict(plain)}
    assert canonical(DPruner(domain="law")) == {
        "class": "DPruner", **asdict(plain), "domain": "law", "general": "other_parts"
    }  # fmt: skip


def test_a_second_gram_takes_memory(tmp_path: Path) -> None:
    """Catches an estimate without the refinement's own Gram, and with one that nobody takes."""

    def memory(*more: str) -> int:
        return plan_of(tmp_path, *OF_LAW, *more).memory.host

    law, swaps = "pruner.domain=law", "refine=sparse_swaps"
    assert memory(law, swaps) > memory(law)
    assert memory(law, "refine=dsnot") == memory(law), "it reads no Gram"
    assert memory(swaps) == memory(), "it reads the pruner's"


def test_a_run_with_a_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches, in a whole run, gradients of general text, a Gram of the domain's, and scores of neither."""
    scored: dict[str, Tensor] = {}
    score = DPruner.score

    def keeping(self: DPruner, layer: LayerContext) -> Tensor:
        scored[f"{layer.block}.{layer.name}"] = score(self, layer)
        return scored[f"{layer.block}.{layer.name}"]

    monkeypatch.setattr(DPruner, "score", keeping)
    plan, _ = run_tiny(tmp_path, *OF_LAW, "pruner.domain=law", "pruner.regularisation=1e17")
    model = load_model(plan.source, plan.tokenizer, plan.device)
    texts = {text.name: text for text in plan.texts(model).mask}
    assert [len(texts[name].tokens_NT) for name in ("general", "law")] == [5, 2]
    name = next(iter(model.linears[0]))
    view = model.linears[0][name]
    parameter = model.blocks[0].get_parameter(view.parameter).requires_grad_(True)
    gradients = []
    for tokens in texts["law"].tokens_NT:
        logits = model.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        [found] = torch.autograd.grad(nn.functional.cross_entropy(logits.float(), tokens[1:]), [parameter])
        gradients.append(view.orient(view.of(found)).double())
    given = scored[f"0.{name}"].double()
    weight = view.weight.detach().double()
    gradient = torch.stack(gradients).mean(dim=0)
    square = torch.stack(gradients).square().mean(dim=0)
    shares = []
    for read, right in ((["general"], True), (["general", "law"], False)):
        tokens = sum(texts[part].tokens_NT.numel() for part in read)
        hessian = 2 * _grams(model, [texts[part] for part in read])[name] / tokens
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
        general = weight.square() / (2 * torch.linalg.inv(damped).diagonal())
        second = 2 * 1e17 * 0.03**2 * general * square
        product = gradient * (1 + second) * weight
        expected = (product + product.square() / 2).abs()
        shares.append(second.mean())
        assert right == torch.allclose(given, expected, rtol=1e-2, atol=1e-3 * float(given.max()))
    assert shares[0] > 1
