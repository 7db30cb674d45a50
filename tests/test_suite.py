"""A suite of evaluators: what stands side by side was measured alike, and what failed is tried again."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeModel
from helpers import perplexity_on, plan_of, run_tiny, write_documents
from reprune.compose import compose_run
from reprune.errors import ConfigError, RunError
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.perplexity import Perplexity
from reprune.evaluation.suite import SuiteEntry, check_suite, dense_result
from reprune.files import read_json
from support import random_text

WINDOWS = "evaluation.perplexity.num_windows"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of random documents to evaluate on."""
    path = tmp_path_factory.mktemp("text") / "mine.jsonl"
    write_documents(path)
    return path


def _named(path: Path, name: str) -> list[str]:
    return [item.replace(".mine=", f".{name}=") for item in perplexity_on(mine=path)]


def test_dense_and_pruned_numbers_were_measured_alike(tmp_path: Path, text: Path) -> None:
    """Catches the dense model's number on two windows beside the pruned model's on three."""
    alone = {
        count: run_tiny(tmp_path / str(count), *perplexity_on(mine=text), f"{WINDOWS}={count}")[1]["metrics"]
        for count in (2, 3)
    }
    pair = ("eval/dense/perplexity/mine", "eval/pruned/perplexity/mine")
    for number, order in enumerate([(3, 2), (2, 3)]):
        place = tmp_path / f"order{number}"
        for count in order:
            run_tiny(place, *perplexity_on(mine=text), f"{WINDOWS}={count}")
        # A third suite says nothing of 'mine': what it shows is the latest of the two, both sides of it.
        plan, shown = run_tiny(place, *_named(text, "other"), f"{WINDOWS}=4")
        files = sorted(
            (plan.folder.path / "evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime
        )
        assert len(files) == 3
        assert [shown["metrics"][name] for name in pair] == [alone[order[1]][name] for name in pair]
        assert {"eval/dense/perplexity/other", "eval/pruned/perplexity/other"} <= set(shown["metrics"])


def _failing(monkeypatch: pytest.MonkeyPatch, on_dense: bool, parts: bool) -> list[bool]:
    """Perplexity that fails on the dense or the pruned model, wholly or in a part; which models it was asked for."""
    asked: list[bool] = []
    working = Perplexity.evaluate

    def fail(self: Perplexity, task: Task) -> Outcome:
        dense = task.dense is None
        asked.append(dense)
        if dense != on_dense:
            return working(self, task)
        if parts:
            found = working(self, task)
            return Outcome(found.metrics, {"perplexity/some": "a part broke"})
        raise RunError("it broke\nand more of it")

    monkeypatch.setattr(Perplexity, "evaluate", fail)
    return asked


@pytest.mark.parametrize("parts", [True, False])
def test_what_failed_of_the_dense_model_does_not_take_the_rest_along(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    """Catches a dense failure that ends the run, that is cached, recorded as finished, or never tried again."""
    with monkeypatch.context() as patch:
        patch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
        _failing(patch, on_dense=True, parts=parts)
        plan, result = run_tiny(tmp_path, *perplexity_on(mine=text))
    part, reason = ("perplexity/some", "a part broke") if parts else ("perplexity", "it broke")
    assert result["failed_evaluations"] == {f"dense {part}": reason}
    assert result["metrics"]["eval/pruned/perplexity/mine"] > 1
    assert ("eval/dense/perplexity/mine" in result["metrics"]) == parts
    [file] = (plan.folder.path / "evaluations").glob("*.json")
    assert read_json(file)["status"] == "failed"
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    _, again = run_tiny(tmp_path, *perplexity_on(mine=text))
    assert "failed_evaluations" not in again
    assert again["metrics"]["eval/dense/perplexity/mine"] > 1
    assert sorted(path.name for path in (plan.folder.path / "evaluations").glob("dense-*")) == []


def test_a_later_evaluation_leaves_the_record_of_the_pruning(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches versions, config and status of the pruning overwritten by those of an evaluation."""
    plan, _ = run_tiny(tmp_path, "export.model=true")
    folder = plan.folder.path
    marked = {**read_json(folder / "environment.json"), "commit": "of the pruning"}
    (folder / "environment.json").write_text(json.dumps(marked))
    kept = {name: (folder / name).read_bytes() for name in ("config.yaml", "environment.json", "status.json")}
    _failing(monkeypatch, on_dense=False, parts=False)
    run_tiny(tmp_path, *perplexity_on(mine=text))
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    [file] = (folder / "evaluations").glob("*.json")
    assert read_json(file)["environment"]["packages"]["torch"]


class _Length:
    """An evaluator that counts the tokens that the model's tokenizer makes of a sentence."""

    def cut(self, tokenizer: Any, key: str) -> dict[str, Any]:
        return {}

    def identity(self, texts: Any) -> dict[str, Any]:
        return {"evaluator": "length"}

    def evaluate(self, task: Task) -> Outcome:
        return Outcome({"length": float(len(task.model.tokenizer("one sentence")["input_ids"]))})


def test_dense_results_belong_to_a_tokenizer(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the same weights under another tokenizer that are given the first one's numbers."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path))
    model = make_model("llama")
    entry = SuiteEntry("length", _Length(), {})

    def length() -> float:
        found = dense_result(model, entry, tmp_path / "scratch", lambda name: lambda done, total: None)
        return found.outcome.metrics["length"]

    first = length()
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_tokens(["one sentence"])
    assert length() < first


def test_entries_with_the_same_metrics_are_refused(tmp_path: Path, text: Path) -> None:
    """Catches one of two evaluations that is lost because the other has its names."""
    second = [
        item.replace("evaluation.perplexity.", "evaluation.second.") for item in perplexity_on(mine=text)[1:]
    ]
    target = "+evaluation.second._target_=reprune.evaluation.perplexity.Perplexity"
    added = [target, *(f"+{item.lstrip('+')}" for item in second if not item.startswith("~"))]
    with pytest.raises(ConfigError, match=r"(?s)evaluation\.second.*those of evaluation\.perplexity.*mine"):
        plan_of(tmp_path, *perplexity_on(mine=text), *added)
    other = [item.replace("texts.mine", "texts.other") for item in added]
    plan_of(tmp_path, *perplexity_on(mine=text), *other)


@pytest.mark.parametrize("listed", ["[perplexity,quick]", "[zero_shot,zero_shot_self_calibration]"])
def test_options_that_fill_one_key_are_no_list(listed: str) -> None:
    """Catches two options that Hydra merges into one of neither kind."""
    with pytest.raises(ConfigError, match=r"(?s)both fill 'evaluation\.\w+'"):
        compose_run([f"evaluation={listed}"])


def test_options_that_go_together_are_a_list() -> None:
    """Catches a list of options of which one is lost."""
    config = compose_run(["evaluation=[perplexity,field,fidelity,zero_shot,generation]"]).config
    assert set(config["evaluation"]) == {"perplexity", "field", "fidelity", "zero_shot", "generation"}


def test_what_does_not_fit_the_context_is_refused() -> None:
    """Catches a text that the model's context does not hold, found when the model is there."""
    entry = SuiteEntry("length", _Length(), {"long": random_text("long", "evaluation", length=40)})
    check_suite([entry], 40)
    check_suite([entry], None)
    with pytest.raises(ConfigError, match=r"(?s)evaluation\.length\.length.*40.*at most 39"):
        check_suite([entry], 39)


def test_latest_of_two_copied_evaluations_counts(tmp_path: Path, text: Path) -> None:
    """Catches an order of earlier evaluations by the accident of their hashes."""
    for count in (3, 2):
        plan, _ = run_tiny(tmp_path, *perplexity_on(mine=text), f"{WINDOWS}={count}")
    files = sorted((plan.folder.path / "evaluations").glob("*.json"))
    for first, second in (files, files[::-1]):
        os.utime(first, (1, 1))
        os.utime(second, (2, 2))
        _, shown = run_tiny(tmp_path, *_named(text, f"other{first.stem}"), f"{WINDOWS}=4")
        expected = read_json(second)["metrics"]["perplexity/mine"]
        assert shown["metrics"]["eval/pruned/perplexity/mine"] == expected
