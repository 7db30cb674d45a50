"""Fidelity to the dense model against two whole models; the two halves of a model against the whole."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import MakeModel
from helpers import run_tiny, write_documents
from reprune.calibration.source import TextSet
from reprune.errors import ConfigError, RunError
from reprune.evaluation import batches, fidelity
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.fidelity import Fidelity
from reprune.model import head, likelihood
from reprune.model.head import final_hidden, head_hash, head_logits, states_by_depth
from reprune.model.likelihood import row_losses, token_losses
from reprune.model.loading import LoadedModel
from support import ARCHITECTURES, block_outputs, load_tiny, random_text

TEXTS = {
    "one": random_text("one", "evaluation", num_sequences=5, length=12),
    "two": random_text("two", "evaluation", num_sequences=2, length=9),
}
RIGHT = ("lost", "gained")


class _Flat(nn.Module):
    """A causal model whose blocks hang on itself: nothing lies between it and them."""

    base_model_prefix = "nothing"

    def __init__(self) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(300, 8, _weight=torch.randn(300, 8, generator=stream))
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.out = nn.Linear(8, 300)
        for parameter in [*self.layers.parameters(), *self.out.parameters()]:
            parameter.data = torch.randn(parameter.shape, generator=stream)

    def forward(self, input_ids: Tensor, **keywords: Any) -> Any:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))

        class Output:
            logits = self.out(hidden)

        return Output()

    def get_output_embeddings(self) -> nn.Module:
        return self.out


@pytest.fixture
def flat(make_model: MakeModel) -> LoadedModel:
    """A LoadedModel without a trunk."""
    model = _Flat()
    tiny = make_model()
    return LoadedModel("flat", model, tiny.tokenizer, model.layers, tiny.plan, {})


def _pruned(model: LoadedModel, share: float = 0.3) -> LoadedModel:
    """The same model with its blocks' small weights removed, in place."""
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() > 1:
                parameter.mul_(parameter.abs() > share * parameter.abs().mean())
    return model


def _evaluate(
    folder: Path,
    model: LoadedModel,
    dense: Path | None,
    texts: dict[str, TextSet] | None = None,
    **choices: Any,
) -> Outcome:
    folder.mkdir()
    evaluator = Fidelity(texts={"unused": "unused"}, **{"depth_windows": 2, **choices})
    return evaluator.evaluate(Task(model, texts or TEXTS, folder, dense, lambda done, total: None))


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[LoadedModel, LoadedModel, Path, Outcome]:
    """A dense model, a pruned one, and the folders and metrics of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        dense, pruned = load_tiny("gemma2"), _pruned(load_tiny("gemma2"))
    place = tmp_path_factory.mktemp("fidelity")
    assert _evaluate(place / "dense", dense, None).metrics == {}
    return dense, pruned, place, _evaluate(place / "pruned", pruned, place / "dense")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_behind_trunk_is_the_model(make_model: MakeModel, architecture: str) -> None:
    """Catches a scale, a cap or a projection that is lost between trunk and head, for any cut of the positions."""
    model = make_model(architecture)
    tokens = random_text("x").tokens_NT[:3]
    whole = model.logits(tokens)
    hidden = final_hidden(model, tokens)
    assert hidden.shape == (3, 12, model.model.config.hidden_size)
    for size in (1, 5, 36):
        found = torch.cat([head_logits(model, part) for part in hidden.flatten(0, 1).split(size)])
        assert float((found.view(whole.shape) - whole).abs().max()) <= 1e-5 * float(whole.abs().max())
    *outputs, final = states_by_depth(model, tokens)
    assert torch.equal(final, hidden)
    for found, expected in zip(outputs, block_outputs(model, tokens), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(model.logits(tokens), whole), "the model is as it was"


def test_model_without_a_trunk(flat: LoadedModel, tmp_path: Path) -> None:
    """Catches a model that has to have a base, or numbers that are others without one."""
    tokens = random_text("x").tokens_NT
    logits = flat.logits(tokens)
    assert torch.equal(final_hidden(flat, tokens), logits)
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    assert torch.allclose(token_losses(flat, tokens).flatten(), expected, rtol=1e-6)
    assert torch.allclose(row_losses(flat, tokens), expected.view(6, -1).double().mean(dim=1), rtol=1e-6)
    _evaluate(tmp_path / "dense", flat, None)
    metrics = _evaluate(tmp_path / "same", flat, tmp_path / "dense").metrics
    assert metrics["fidelity/one/kl"] == 0
    dense = flat.logits(TEXTS["one"].tokens_NT)[:, :-1].double().log_softmax(dim=-1)
    pruned = _pruned(flat)
    metrics = _evaluate(tmp_path / "pruned", pruned, tmp_path / "dense").metrics
    told = pruned.logits(TEXTS["one"].tokens_NT)[:, :-1].double().log_softmax(dim=-1)
    divergence = float((dense.exp() * (dense - told)).sum(dim=-1).mean())
    assert metrics["fidelity/one/kl"] == pytest.approx(divergence, rel=1e-5)
    assert metrics["fidelity/one/kl"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("at_once", [1, 700, 2**24])
def test_losses_in_chunks(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, dtype: str, at_once: int
) -> None:
    """Catches a chunk lost, repeated or out of place, and logits that are rounded before the softmax."""
    model = make_model("llama", dtype=dtype)
    tokens = random_text("x").tokens_NT
    targets = tokens[:, 1:].flatten()
    logits = model.logits(tokens)[:, :-1].flatten(0, 1).float()
    expected = nn.functional.cross_entropy(logits, targets, reduction="none").view(6, 11)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
    calls: list[int] = []
    working = head_logits

    def counted(model: LoadedModel, hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return working(model, hidden)

    monkeypatch.setattr(likelihood, "head_logits", counted)
    found = token_losses(model, tokens)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5 if dtype == "float32" else 2e-2)
    assert sum(calls) == 66
    assert max(calls) == max(1, min(66, at_once // head.vocabulary_size(model)))
    assert token_losses(model, tokens[:, :1]).shape == (6, 0)


def test_against_two_whole_models(both: tuple[LoadedModel, LoadedModel, Path, Outcome]) -> None:
    """Catches KL the other way round, a token too many, flips counted by the wrong model, errors at the wrong depth."""
    dense, pruned, place, outcome = both
    metrics = outcome.metrics
    assert outcome.failed == {}
    for name, text in TEXTS.items():
        tokens = text.tokens_NT
        first, second = dense.logits(tokens)[:, :-1].double(), pruned.logits(tokens)[:, :-1].double()
        told, tells = first.log_softmax(-1), second.log_softmax(-1)
        kl = (told.exp() * (told - tells)).sum(-1)
        assert metrics[f"fidelity/{name}/kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
        assert metrics[f"fidelity/{name}/kl"] > 0.01
        same = lost = gained = 0
        for row in range(len(tokens)):
            for place_ in range(tokens.shape[1] - 1):
                one, other = int(told[row, place_].argmax()), int(tells[row, place_].argmax())
                right = int(tokens[row, place_ + 1])
                same += one == other
                lost += one == right != other
                gained += other == right != one
        count = kl.numel()
        assert metrics[f"fidelity/{name}/top1_agreement"] == pytest.approx(same / count)
        assert metrics[f"fidelity/{name}/lost"] == pytest.approx(lost / count)
        assert metrics[f"fidelity/{name}/gained"] == pytest.approx(gained / count)
        stored = pd.read_parquet(place / "pruned" / f"windows_{name}.parquet")
        assert list(stored.columns) == ["window", "tokens", "kl", "top1_agreement", "lost", "gained"]
        assert torch.tensor(stored["kl"].to_numpy()).allclose(kl.sum(dim=1), rtol=1e-4)
        wanted, got = block_outputs(dense, tokens[:2]), block_outputs(pruned, tokens[:2])
        pairs = [
            *zip(wanted, got, strict=True),
            (final_hidden(dense, tokens[:2]), final_hidden(pruned, tokens[:2])),
        ]
        for depth, (target, student) in zip([0, 1, 2, "final"], pairs, strict=True):
            gap = (target.double() - student.double()).square()
            relative = gap.sum(-1) / target.double().square().sum(-1)
            assert metrics[f"fidelity/{name}/hidden_error/{depth}"] == pytest.approx(
                float(gap.mean()), rel=1e-5
            )
            assert metrics[f"fidelity/{name}/hidden_relative/{depth}"] == pytest.approx(float(relative.mean()), rel=1e-5)  # fmt: skip
    assert "fidelity_evaluation_noise/one/kl" in metrics


def test_flips_by_hand(make_model: MakeModel) -> None:
    """Catches lost and gained taken for each other: random models are never right."""
    model = make_model()
    states = final_hidden(model, random_text("x").tokens_NT[:1])[0, :4]
    best = head_logits(model, states).argmax(dim=-1)
    assert len(set(best.tolist())) == 4
    dense, pruned = states[[0, 0, 1, 2]], states[[0, 1, 0, 3]]
    targets = best[[0, 0, 0, 1]]
    found = fidelity._measures(model, dense, pruned, targets)
    assert found[:, 1].tolist() == [1, 0, 0, 0]
    assert found[:, 2].tolist() == [0, 1, 0, 0]
    assert found[:, 3].tolist() == [0, 0, 1, 0]
    assert found[0, 0] == 0
    assert float(found[1:, 0].min()) > 0


def test_dense_model_against_itself(
    both: tuple[LoadedModel, LoadedModel, Path, Outcome], tmp_path: Path
) -> None:
    """Catches a comparison that finds a difference where there is none."""
    dense, _, place, _ = both
    metrics = _evaluate(tmp_path / "again", dense, place / "dense").metrics
    for name, value in metrics.items():
        assert value == (1 if name.endswith("top1_agreement") and "noise" not in name else 0), name


def test_batches_change_nothing(
    both: tuple[LoadedModel, LoadedModel, Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches windows set against the dense states of others when they go through in other batches."""
    _, pruned, place, outcome = both
    monkeypatch.setattr(fidelity, "rows_a_pass", lambda model, length: 2)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 3000)
    again = _evaluate(tmp_path / "again", pruned, place / "dense")
    assert again.metrics == pytest.approx(outcome.metrics, rel=1e-4, abs=1e-9)


def test_what_is_kept_of_the_dense_model(both: tuple[LoadedModel, LoadedModel, Path, Outcome]) -> None:
    """Catches logits, or the states of all depths for all windows, in the cache."""
    dense, _, place, _ = both
    stored = load_file(place / "dense" / "one.safetensors")
    assert torch.equal(stored.pop("final"), final_hidden(dense, TEXTS["one"].tokens_NT)[:, :-1])
    assert set(stored) == {"depth.0", "depth.1", "depth.2", "depth.final"}
    assert {tuple(tensor.shape) for tensor in stored.values()} == {(2, 12, 32)}


def test_another_head_is_refused(
    both: tuple[LoadedModel, LoadedModel, Path, Outcome], tmp_path: Path, make_model: MakeModel
) -> None:
    """Catches dense predictions made with a head that is not the dense model's, tied or not."""
    _, _, place, _ = both
    other = _pruned(make_model("gemma2"))
    same = head_hash(other)
    other.model.get_output_embeddings().weight.data[3, 4] += 0.5
    assert head_hash(other) != same
    with pytest.raises(RunError, match=r"head .* is not the dense"):
        _evaluate(tmp_path / "other", other, place / "dense")


def test_broken_model_has_failed(
    both: tuple[LoadedModel, LoadedModel, Path, Outcome], tmp_path: Path, make_model: MakeModel
) -> None:
    """Catches NaN among the metrics, and a dense text that failed passed over in silence."""
    _, _, place, _ = both
    broken = make_model("gemma2")
    next(broken.blocks[1].parameters()).data.fill_(math.nan)
    for number, depth_windows in enumerate((0, 2)):
        with pytest.raises(RunError, match="kl is not finite"):
            _evaluate(tmp_path / f"broken{number}", broken, place / "dense", depth_windows=depth_windows)
    outcome = _evaluate(tmp_path / "dense", broken, None)
    assert set(outcome.failed) == {"fidelity/one", "fidelity/two"}
    assert outcome.metrics == {}
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "one.safetensors").write_bytes((place / "dense" / "one.safetensors").read_bytes())
    half = _evaluate(tmp_path / "half", make_model("gemma2"), lacking)
    assert set(half.failed) == {"fidelity/two"}
    assert half.metrics["fidelity/one/kl"] == 0


def test_memory_that_runs_out(
    both: tuple[LoadedModel, LoadedModel, Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows that are skipped or set against others after the batch was halved."""
    _, pruned, place, outcome = both
    working = fidelity.final_hidden

    def small(model: LoadedModel, tokens: Tensor) -> Tensor:
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        return working(model, tokens)

    monkeypatch.setattr(fidelity, "final_hidden", small)
    again = _evaluate(tmp_path / "again", pruned, place / "dense")
    assert again.metrics == pytest.approx(outcome.metrics, rel=1e-4, abs=1e-9)
    assert any("going on with 1" in note for note in again.notes)
    assert batches.halved(2, [], "x") == 1


def test_a_run_compares_with_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluator that the suite cannot run, and dense metrics where there is nothing to compare."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    write_documents(tmp_path / "mine.jsonl", count=6)
    chosen = [
        "evaluation=fidelity", *(f"~evaluation.fidelity.texts.{name}" for name in ("web", "wiki", "code")),
        f"+evaluation.fidelity.texts.mine={tmp_path / 'mine.jsonl'}", "evaluation.fidelity.length=16",
        "evaluation.fidelity.num_windows=3", "evaluation.fidelity.depth_windows=1",
    ]  # fmt: skip
    plan, result = run_tiny(tmp_path / "out", *chosen)
    metrics = result["metrics"]
    assert not [name for name in metrics if name.startswith("eval/dense")]
    assert metrics["eval/pruned/fidelity/mine/kl"] > 0
    assert metrics["eval/pruned/fidelity/mine/hidden_error/2"] > 0
    assert len(list((plan.folder.path / "evaluations").rglob("windows_mine.parquet"))) == 1
    _, none = run_tiny(tmp_path / "out", *chosen, "pruner=none", "sparsity=null", "reconstruction=none")
    assert none["metrics"]["eval/pruned/fidelity/mine/kl"] == pytest.approx(0, abs=1e-6)
    assert none["metrics"]["eval/pruned/fidelity/mine/top1_agreement"] == 1


def test_padding_of_short_documents_counts_for_nothing(
    both: tuple[LoadedModel, LoadedModel, Path, Outcome], tmp_path: Path
) -> None:
    """Catches tokens behind a document's end in KL or in the errors by depth."""
    from reprune.evaluation.texts import ScoredSet

    dense, pruned, _, _ = both
    plain = random_text("short", "evaluation", num_sequences=2, length=7)
    fields = {name: getattr(plain, name) for name in ("name", "role", "document_ids", "source", "bos")}
    filled = torch.cat([plain.tokens_NT, torch.full((2, 5), 1)], dim=1)
    scored = torch.zeros(2, 11, dtype=torch.bool)
    scored[:, :6] = True
    padded = ScoredSet(**fields, tokens_NT=filled, scored_NT=scored, document_N=torch.arange(2))
    found = []
    for number, text in enumerate((plain, padded)):
        _evaluate(tmp_path / f"d{number}", dense, None, {"x": text})
        found.append(_evaluate(tmp_path / f"p{number}", pruned, tmp_path / f"d{number}", {"x": text}).metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-9)
    assert replace(padded, scored_NT=~scored).key != padded.key != plain.key


def test_wrong_depth() -> None:
    """Catches a number of windows that cannot be."""
    with pytest.raises(ConfigError, match="depth_windows"):
        Fidelity(texts={"a": "web"}, depth_windows=-1)
