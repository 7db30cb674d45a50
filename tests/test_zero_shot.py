"""Accuracy through the evaluation harness: its own numbers, examples kept, nothing else disturbed."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from scipy.special import softmax
from sklearn.metrics import brier_score_loss
from torch import Tensor

from helpers import plan_of, run_tiny
from reprune import dry_run
from reprune.errors import ConfigError
from reprune.evaluation import zero_shot as zero_shot_module
from reprune.evaluation.confidence import confidence, expected_calibration_error
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.examples import read_examples
from reprune.evaluation.perplexity import Perplexity
from reprune.evaluation.suite import SuiteEntry, dense_result, evaluate_pruned
from reprune.evaluation.zero_shot import ZeroShot
from reprune.files import read_json, sha256_of_json
from reprune.model.loading import LoadedModel
from reprune.reporting.paired import paired
from support import load_tiny

LETTERS = "abcdefghij"
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
ACC_NORM = {**ACC, "metric": "acc_norm"}
EXACT = {**ACC, "metric": "exact_match"}


@pytest.fixture(autouse=True, scope="module")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What datasets and models leave behind stays out of the user's caches."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("caches")
        patch.setenv("REPRUNE_CACHE", str(place / "reprune"))
        patch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "datasets")
        yield


def _word(stream: random.Random, most: int = 7) -> str:
    return "".join(stream.choices(LETTERS, k=stream.randint(1, most)))


def write_tasks(folder: Path, seed: int = 0, count: int = 14) -> Path:
    """Four small tasks and a group; data files are named relative to the task files, as people write them."""
    stream = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    choices = [
        {"question": _word(stream), "choices": [_word(stream) for _ in range(stream.randint(2, 4))]}
        for _ in range(count)
    ]
    for document in choices:
        document["gold"] = stream.randrange(len(document["choices"]))
    _write_lines(folder / "data" / "choices.jsonl", choices)
    with (folder / "yes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "label"])
        writer.writerows([_word(stream, 20), stream.randrange(2)] for _ in range(count))
    _write_lines(folder / "blanks.jsonl", [_blank(stream) for _ in range(count)])
    _write_lines(
        folder / "copies.jsonl", [{"text": _word(stream), "answer": _word(stream, 2)} for _ in range(6)]
    )
    _write_task(
        folder / "choices.yaml", "tiny_choices", "json", "data/choices.jsonl",
        doc_to_text="{{question}}:", doc_to_choice="choices", doc_to_target="gold", metric_list=[ACC, ACC_NORM],
    )  # fmt: skip
    _write_task(
        folder / "yes.yaml", "tiny_yes", "csv", "yes.csv",
        doc_to_text="{{question}}?", doc_to_choice=["no", "yes"], doc_to_target="label", metric_list=[ACC],
    )  # fmt: skip
    _write_task(
        folder / "blanks.yaml", "tiny_blanks", "json", "blanks.jsonl",
        doc_to_text="right", doc_to_choice="starts", doc_to_target="end", metric_list=[ACC],
    )  # fmt: skip
    _write_task(
        folder / "copies.yaml", "tiny_copies", "json", "copies.jsonl", output_type="generate_until",
        doc_to_text="{{text}}", doc_to_target="{{answer}}", metric_list=[EXACT],
        generation_kwargs={"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
    )  # fmt: skip
    group = {
        "group": "tiny_both",
        "task": ["tiny_choices", "tiny_yes"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


def _blank(stream: random.Random) -> dict[str, Any]:
    return {
        "starts": [_word(stream), _word(stream)],
        "end": f" {_word(stream)}",
        "right": stream.randrange(2),
    }


def _write_lines(path: Path, documents: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def _write_task(path: Path, name: str, kind: str, data: str, **config: Any) -> None:
    content = {
        "task": name,
        "dataset_path": kind,
        "dataset_kwargs": {"data_files": {"validation": data}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        **config,
    }
    path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_tiny()


def evaluate(
    evaluator: ZeroShot,
    model: LoadedModel,
    folder: Path,
    dense: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """An outcome with the evaluator's files in `folder`, made new."""
    assert evaluator.cut(model.tokenizer, "evaluation.zero_shot") == {}
    folder.mkdir()
    return evaluator.evaluate(Task(model, {}, folder, dense, on_progress))


def zero_shot(tasks: Path, *names: str, **given: Any) -> ZeroShot:
    """An evaluator of tiny tasks."""
    return ZeroShot(tasks=[f"tiny_{name}" for name in names], include_path=str(tasks), **given)


@torch.no_grad()
def likelihood(model: LoadedModel, before: str, text: str) -> float:
    """Of `text` after `before` in nats, by a plain forward pass over bytes."""
    start = model.tokenizer(before)["input_ids"]
    ids = start + model.tokenizer(text, add_special_tokens=False)["input_ids"]
    logs = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return float(sum(logs[place - 1, ids[place]] for place in range(len(start), len(ids))))


def test_equals_the_harness_on_its_command_line(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches a number that differs in any digit from what the harness says of the saved model: of accuracy, of
    normalised accuracy, of generation, of their errors."""
    model.save(tmp_path / "model")
    saved = tmp_path / "told"
    # Started where relative data files mean the same to both.
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={tmp_path / 'model'},dtype=float32", "--device", "cpu", "--batch_size", "4", "--limit", "9",
        "--tasks", "tiny_choices,tiny_copies", "--include_path", str(tasks), "--output_path", str(saved),
    ]  # fmt: skip
    subprocess.run(
        command,
        cwd=tasks,
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    [file] = saved.rglob("results_*.json")
    told = json.loads(file.read_text())["results"]
    evaluator = zero_shot(tasks, "choices", "copies", limit=9, batch_size=4)
    found = evaluate(evaluator, model, tmp_path / "files").metrics
    expected = {
        f"zero_shot/{task}/{key.split(',')[0]}": value
        for task, row in told.items()
        for key, value in row.items()
        if key.endswith(",none")
    }
    assert len(expected) == 6
    assert {name: found[name] for name in expected} == expected


def test_choices_are_scored_as_by_hand(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches examples that are stored with another's answer, another order of choices or another gold."""
    found = evaluate(zero_shot(tasks, "choices", "blanks"), model, tmp_path / "files")
    documents = [json.loads(line) for line in (tasks / "data" / "choices.jsonl").read_text().splitlines()]
    rows = read_examples(tmp_path / "files" / "examples_tiny_choices.parquet")
    assert list(rows["doc_id"]) == list(range(len(documents)))
    for document, (_, row) in zip(documents, rows.iterrows(), strict=True):
        likelihoods = [
            likelihood(model, f"{document['question']}:", f" {text}") for text in document["choices"]
        ]
        assert row["log_likelihoods"] == pytest.approx(likelihoods, abs=1e-3)
        assert row["gold"] == document["gold"]
        assert row["predicted"] == int(np.argmax(likelihoods))
        assert row["acc"] == float(row["predicted"] == document["gold"])
    assert found.metrics["zero_shot/tiny_choices/acc"] == rows["acc"].mean()
    # Sentences with a blank: the choices are what stands before one and the same end.
    blanks = [json.loads(line) for line in (tasks / "blanks.jsonl").read_text().splitlines()]
    rows = read_examples(tmp_path / "files" / "examples_tiny_blanks.parquet")
    assert list(rows["gold"]) == [document["right"] for document in blanks]
    assert ((rows["predicted"] == rows["gold"]).astype(float) == rows["acc"]).all()


def test_mean_is_over_entries_and_a_group_is_one(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches a mean in which a group counts as often as it has tasks, and errors that are averaged."""
    found = evaluate(zero_shot(tasks, "both", "blanks"), model, tmp_path / "files").metrics
    group, alone = found["zero_shot/tiny_both/acc"], found["zero_shot/tiny_blanks/acc"]
    parts = [found["zero_shot/tiny_choices/acc"], found["zero_shot/tiny_yes/acc"]]
    assert group == pytest.approx(sum(parts) / 2)
    assert found["zero_shot/mean/acc"] == pytest.approx((group + alone) / 2)
    errors = [found[f"zero_shot/tiny_{name}/acc_stderr"] for name in ("both", "blanks")]
    assert found["zero_shot/mean/acc_stderr"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert (tmp_path / "files" / "examples_tiny_yes.parquet").is_file()


def test_flips_are_counted_against_the_dense_model(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches flips that are exchanged, counted among the right ones only, or joined by row instead of document."""
    evaluator = zero_shot(tasks, "blanks", "copies")
    evaluate(evaluator, model, tmp_path / "dense")
    pruned = load_tiny(num_blocks=1)
    found = evaluate(evaluator, pruned, tmp_path / "pruned", tmp_path / "dense").metrics
    before, after = (
        read_examples(tmp_path / side / "examples_tiny_blanks.parquet").set_index("doc_id")["acc"]
        for side in ("dense", "pruned")
    )
    lost = [bool(before[index] == 1 and after[index] == 0) for index in before.index]
    gained = [bool(before[index] == 0 and after[index] == 1) for index in before.index]
    assert 0 < sum(gained) < sum(lost)
    assert found["zero_shot/tiny_blanks/flips_lost"] == sum(lost) / 14
    assert found["zero_shot/tiny_blanks/flips_gained"] == sum(gained) / 14
    change = after.mean() - before.mean()
    assert sum(gained) / 14 - sum(lost) / 14 == pytest.approx(change)
    assert found["zero_shot/tiny_copies/flips_lost"] == 0


def test_a_failed_task_is_told_and_the_others_count(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches an evaluation that ends with its first broken task, a 0 in its place, and a mean without it."""
    broken = write_tasks(tmp_path / "tasks")
    lines = (broken / "data" / "choices.jsonl").read_text().splitlines()
    document = {**json.loads(lines[5]), "gold": "none of them"}
    whole = [json.loads(line) for line in lines]
    whole = [{**it, "gold": str(it["gold"])} for it in whole]
    whole[5] = {**whole[5], "gold": document["gold"]}
    _write_lines(broken / "data" / "choices.jsonl", whole)
    text = (broken / "choices.yaml").read_text()
    (broken / "choices.yaml").write_text(
        text.replace("doc_to_target: gold", "doc_to_target: '{{[0,1,2][gold|int(9)]}}'")
    )
    found = evaluate(zero_shot(broken, "choices", "yes"), model, tmp_path / "files")
    assert list(found.failed) == ["zero_shot/tiny_choices"]
    assert "UndefinedError" in found.failed["zero_shot/tiny_choices"]
    assert "zero_shot/tiny_yes/acc" in found.metrics
    assert not any("tiny_choices" in name or "mean" in name for name in found.metrics)


def test_a_model_that_says_nan_fails(tasks: Path, tmp_path: Path) -> None:
    """Catches the accuracy of a broken model, which always takes the first choice."""
    model = load_tiny()
    with torch.no_grad():
        model.model.get_output_embeddings().weight.fill_(float("nan"))
    found = evaluate(zero_shot(tasks, "yes"), model, tmp_path / "files")
    assert found.metrics == {}
    assert "14 of 14 examples are NaN" in found.failed["zero_shot/tiny_yes"]


def test_out_of_memory_halves_the_batch(
    tasks: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a batch that does not fit and ends the evaluation, is not told, or changes the numbers."""
    whole = evaluate(zero_shot(tasks, "choices", "yes", batch_size=8), model, tmp_path / "whole")
    plain = HFLM._model_call
    sizes = []

    def call(self: HFLM, inps: Tensor, *args: Any, **keywords: Any) -> Any:
        sizes.append(len(inps))
        if len(inps) > 3:
            raise torch.OutOfMemoryError("no room")
        return plain(self, inps, *args, **keywords)

    monkeypatch.setattr(HFLM, "_model_call", call)
    found = evaluate(zero_shot(tasks, "choices", "yes", batch_size=8), model, tmp_path / "files")
    assert found.failed == {}
    assert found.notes == [
        "zero_shot/tiny_choices: the device is out of memory with 8 rows at once, going on with 4",
        "zero_shot/tiny_choices: the device is out of memory with 4 rows at once, going on with 2",
    ]
    assert max(sizes[2:]) == 2
    assert found.metrics == pytest.approx(whole.metrics, abs=1e-4)


def test_out_of_memory_with_one_row_fails_the_task(
    tasks: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches halving that never ends."""

    def call(self: HFLM, inps: Tensor, *args: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(HFLM, "_model_call", call)
    found = evaluate(zero_shot(tasks, "yes", batch_size=2), model, tmp_path / "files")
    assert "single row" in found.failed["zero_shot/tiny_yes"]


def test_interrupted_evaluation_goes_on_with_the_next_task(
    tasks: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of finished tasks asked again, on the dense model or the pruned one, or other numbers for it."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    entry = SuiteEntry("zero_shot", zero_shot(tasks, "choices", "yes"), {})
    plain, asked = zero_shot_module.measure, []

    def stopped(*given: Any, **more: Any) -> Any:
        asked.append(given[2])
        if asked[-1] == "tiny_yes" and asked.count("tiny_yes") in (1, 3):
            raise KeyboardInterrupt
        return plain(*given, **more)

    monkeypatch.setattr(zero_shot_module, "measure", stopped)

    def report(name: str) -> Any:
        return lambda done, total: None

    with pytest.raises(KeyboardInterrupt):
        dense_result(model, entry, tmp_path / "scratch", report)
    dense = dense_result(model, entry, tmp_path / "scratch", report)
    with pytest.raises(KeyboardInterrupt):
        evaluate_pruned(model, entry, tmp_path, dense, report)
    evaluate_pruned(model, entry, tmp_path, dense, report)
    assert asked == ["tiny_choices", "tiny_yes", "tiny_yes"] * 2
    undisturbed = evaluate(zero_shot(tasks, "choices", "yes"), model, tmp_path / "files").metrics
    assert dense.outcome.metrics == undisturbed
    [file] = (tmp_path / "evaluations").glob("*.json")
    content = read_json(file)
    assert content["status"] == "finished"
    assert undisturbed.items() <= content["metrics"].items()
    for folder in (dense.folder, file.with_suffix("")):
        names = {path.name for path in folder.glob("*")} - {"outcome.json", "key.json"}
        assert names == {"examples_tiny_choices.parquet", "examples_tiny_yes.parquet"}


def test_order_and_repetition_do_not_matter(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches worked examples drawn from a stream that goes on, and state that a first call leaves."""
    first = zero_shot(tasks, "yes", "choices", num_fewshot=2)
    second = zero_shot(tasks, "choices", "yes", num_fewshot=2)
    metrics = [
        evaluate(first, model, tmp_path / "a").metrics,
        evaluate(first, model, tmp_path / "b").metrics,
        evaluate(second, model, tmp_path / "c").metrics,
    ]
    assert metrics[0] == metrics[1] == metrics[2]
    assert sha256_of_json(first.identity({})) == sha256_of_json(second.identity({}))
    files = [(tmp_path / side / "examples_tiny_yes.parquet").read_bytes() for side in "abc"]
    assert files[0] == files[1] == files[2]
    without = evaluate(zero_shot(tasks, "yes", "choices"), model, tmp_path / "d").metrics
    assert without["zero_shot/tiny_yes/brier"] != metrics[0]["zero_shot/tiny_yes/brier"]


def test_nothing_else_is_disturbed(
    tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches seeds, padding, weights or bars of the harness that reach the rest of a run."""
    # The harness would ask git of the folder it is started in.
    monkeypatch.chdir(tmp_path)
    model = load_tiny()
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 8)
    perplexity = Perplexity(texts={"mine": str(text)}, length=16)
    cut = perplexity.cut(model.tokenizer, "evaluation.perplexity")
    (tmp_path / "texts").mkdir()

    def measured() -> dict[str, float]:
        return perplexity.evaluate(
            Task(model, cut, tmp_path / "texts", None, lambda done, total: None)
        ).metrics

    before = measured()
    tensors = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    side, pad = model.tokenizer.padding_side, model.tokenizer.pad_token
    capfd.readouterr()
    streams: list[Any] = []
    for with_tasks in (False, True):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if with_tasks:
            evaluate(zero_shot(tasks, "yes", "copies"), model, tmp_path / "files")
        streams.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    assert streams[0] == streams[1]
    assert (model.tokenizer.padding_side, model.tokenizer.pad_token) == (side, pad)
    after = model.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())
    assert measured() == before


def test_progress_rises_to_the_end(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches a bar that goes back, passes its end or moves only between tasks."""
    seen: list[tuple[int, int]] = []
    evaluator = zero_shot(tasks, "yes", "copies", limit=10, batch_size=4)
    evaluate(evaluator, model, tmp_path / "files", on_progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {16}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (16, 16)
    assert len({done for done, _ in seen}) > 4


def test_identity_is_content(tasks: Path, model: LoadedModel, tmp_path: Path) -> None:
    """Catches an identity that holds the folder, or misses what is asked or how it is batched."""

    def identity(folder: Path, **given: Any) -> str:
        return sha256_of_json(zero_shot(folder, "choices", "yes", **given).identity({}))

    first = identity(tasks)
    assert first == identity(write_tasks(tmp_path / "elsewhere"))
    assert first != identity(tasks, batch_size=3)
    assert first != identity(write_tasks(tmp_path / "other", seed=1))
    assert len({first, identity(tasks, limit=3), identity(tasks, num_fewshot=1)}) == 3
    text = (tmp_path / "elsewhere" / "yes.yaml").read_text()
    (tmp_path / "elsewhere" / "yes.yaml").write_text(text.replace("{{question}}?", "{{question}}!"))
    assert first != identity(tmp_path / "elsewhere")


def test_bad_choices_are_told_before_anything_is_loaded(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a typo or a missing file that is found after hours of pruning."""
    # The harness's own list takes many seconds to make; what is asked for here is in no list.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "none" / "manager.py"))

    def told(**given: Any) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            ZeroShot(**{"include_path": str(tasks), **given}).cut(None, "evaluation.zero_shot")
        return caught.value

    typo = told(tasks=["tiny_yess"])
    assert typo.key == "evaluation.zero_shot.tasks"
    assert typo.hint == "did you mean 'tiny_yes'?"
    assert "tiny_blanks" in (typo.accepted or "")
    assert told(tasks=["x"], include_path=str(tmp_path / "no")).key == "evaluation.zero_shot.include_path"
    (tmp_path / "empty").mkdir()
    assert "no task file" in told(tasks=["x"], include_path=str(tmp_path / "empty")).problem
    assert told(tasks=[]).key == "tasks"
    assert "twice" in told(tasks=["a", "a"]).problem
    assert "part of" in told(tasks=["tiny_both", "tiny_yes"]).problem
    for key, value in {"limit": 0, "batch_size": 0, "num_fewshot": -1}.items():
        assert told(tasks=["tiny_yes"], **{key: value}).key == key
    broken = write_tasks(tmp_path / "broken")
    (broken / "yes.csv").unlink()
    gone = told(tasks=["tiny_yes"], include_path=str(broken))
    assert str(gone.value) == str(broken / "yes.csv")
    assert told(tasks=["tiny_both"], include_path=str(broken)).value == gone.value
    (broken / "blanks.jsonl").write_text("{no json\n")
    assert "cannot be loaded" in told(tasks=["tiny_blanks"], include_path=str(broken)).problem
    text = (broken / "choices.yaml").read_text()
    (broken / "choices.yaml").write_text(text + "num_fewshot: 0\n")
    assert told(tasks=["tiny_choices"], include_path=str(broken), num_fewshot=2).key.endswith("num_fewshot")
    (broken / "hub.yaml").write_text(text.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    (broken / "choices.yaml").unlink()
    assert "include_path" in (told(tasks=["tiny_choices"], include_path=str(broken)).hint or "")


def test_a_task_does_not_stumble_over_its_neighbours(tasks: Path, tmp_path: Path) -> None:
    """Catches a folder of which no task can be used because one is broken; the same one asked for is told."""
    other = write_tasks(tmp_path / "tasks")
    text = (other / "yes.yaml").read_text().replace("tiny_yes", "tiny_broken")
    (other / "broken.yaml").write_text(text + "process_docs: !function nowhere.nothing\n")
    assert zero_shot(other, "yes").cut(None, "evaluation.zero_shot") == {}
    with pytest.raises(ConfigError, match="'tiny_broken' cannot be loaded: ImportError"):
        zero_shot(other, "broken").cut(None, "evaluation.zero_shot")


def test_calibration_error_by_brute_force() -> None:
    """Catches bins that are one off, means that are not weighted and scores of the wrong answer."""
    stream = np.random.default_rng(3)
    sure = np.concatenate([stream.uniform(0.02, 1, 300), np.repeat(np.arange(1, 16) / 15, 3)])
    right = stream.uniform(size=len(sure)) < sure**2
    total = 0.0
    for index in range(15):
        inside = (sure > index / 15) & (sure <= (index + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert expected_calibration_error(sure, right) == pytest.approx(total, abs=1e-12)
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


def test_confidence_against_a_library() -> None:
    """Catches a Brier score over the answer alone, and rows of different length that are padded wrongly."""
    stream = np.random.default_rng(4)
    counts = stream.integers(2, 5, 60)
    rows = [stream.normal(size=count) * 3 - 40 for count in counts]
    gold = [int(stream.integers(count)) for count in counts]
    found = confidence([list(row) for row in rows], gold)
    padded = np.zeros((len(rows), 4))
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = softmax(row)
    library = brier_score_loss(gold, padded, labels=[0, 1, 2, 3], scale_by_half=False)
    assert found.brier == pytest.approx(library, abs=1e-12)
    again = confidence([list(row) for row in rows], gold)
    assert again == found
    assert found.ece_stderr is not None
    # The spread over independent draws is what the bootstrap stands for.
    draws = []
    for seed in range(200):
        chosen = np.random.default_rng(seed).integers(60, size=60)
        draws.append(confidence_ece([rows[index] for index in chosen], [gold[index] for index in chosen]))
    assert found.ece_stderr == pytest.approx(float(np.std(draws)), rel=0.2)
    alone = confidence([[-1.0, -2.0]], [0])
    assert alone.ece_stderr is None
    assert alone.brier_stderr is None


def confidence_ece(rows: list[Any], gold: list[int]) -> float:
    """ECE alone."""
    sure = np.array([softmax(row).max() for row in rows])
    right = np.array([int(np.argmax(row)) == index for row, index in zip(rows, gold, strict=True)])
    return expected_calibration_error(sure, right)


def test_a_run_keeps_its_examples_and_two_runs_are_paired(tasks: Path, tmp_path: Path) -> None:
    """Catches files that get lost between evaluator, run folder and comparison, and metrics that are not recorded."""
    asked = ["evaluation=zero_shot", f"evaluation.zero_shot.include_path={tasks}"]
    asked += [
        "evaluation.zero_shot.tasks=[tiny_blanks,tiny_copies]",
        "pruner=magnitude",
        "reconstruction=none",
    ]
    runs = [run_tiny(tmp_path, *asked, f"sparsity={sparsity}") for sparsity in (0.3, 0.8)]
    table = paired(*(plan.folder.path for plan, _ in runs)).set_index("task")
    assert list(table.index) == ["tiny_blanks", "tiny_copies"]
    for (_, result), column in zip(runs, ("acc_first", "acc_second"), strict=True):
        assert result["metrics"]["eval/pruned/zero_shot/tiny_blanks/acc"] == table.loc["tiny_blanks", column]
        assert "eval/dense/zero_shot/mean/acc" in result["metrics"]
        assert "eval/pruned/zero_shot/tiny_blanks/flips_lost" in result["metrics"]
        assert "failed_evaluations" not in result


def test_a_plan_tells_what_will_be_asked(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tasks that no plan shows, and a guess of the time that seems to hold them."""
    asked = ["evaluation=zero_shot", f"evaluation.zero_shot.include_path={tasks}", "evaluation.zero_shot.limit=2"]  # fmt: skip
    for more, says in ((asked, True), ([], False)):
        given = [*more, "evaluation.zero_shot.tasks=[tiny_blanks,tiny_copies]"] if more else []
        dry_run.show(plan_of(tmp_path, *given))
        said = capsys.readouterr().out
        assert ("without tasks" in said) == says
        assert ("zero_shot, tiny_blanks: 2 examples" in said) == says


def test_an_infinite_metric_is_left_out_and_told(
    tasks: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an infinity in a result file, which is no JSON, and an accuracy that is lost with it."""
    text = (tasks / "yes.yaml").read_text()
    other = write_tasks(tmp_path / "tasks")
    (other / "yes.yaml").write_text(
        text.replace("aggregation: mean", "aggregation: !function endless.aggregate")
    )
    (other / "endless.py").write_text("def aggregate(items):\n    return float('inf')\n")
    found = evaluate(zero_shot(other, "yes"), model, tmp_path / "files")
    assert "zero_shot/tiny_yes/acc is inf and left out" in found.notes
    assert found.failed == {}
    assert "zero_shot/tiny_yes/acc" not in found.metrics
    assert "zero_shot/tiny_yes/brier" in found.metrics
