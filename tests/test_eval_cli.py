"""`reprune-eval`: a finished run or a saved model is evaluated without pruning, and nothing is computed twice."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import perplexity_on, run_tiny, timeless, write_documents
from reprune import eval_cli, eval_model, pipeline
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.perplexity import Perplexity
from reprune.files import read_json
from reprune.model.loading import load_model

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Do `reprune-eval` with these words; its exit code and what it printed and told."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["reprune-eval", *map(str, words)])
        monkeypatch.setattr(eval_cli, "configure_logging", lambda: None)
        code = 0
        try:
            eval_cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def on(tmp_path: Path) -> list[str]:
    """Overrides for perplexity on a text of 40 documents."""
    path = tmp_path / "mine.jsonl"
    write_documents(path)
    return perplexity_on(mine=path)


def _forbidden(*_: object, **__: object) -> NoReturn:
    raise AssertionError("this must not be called")


def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no weight may be loaded."""
    for module in (pipeline, eval_model):
        monkeypatch.setattr(module, "load_model", _forbidden)
    monkeypatch.setattr("reprune.eval_setting.load_model", _forbidden)


def result_of(folder: Path) -> dict[str, Any]:
    """A run's record without what differs between two runs of the same kind."""
    result: dict[str, Any] = read_json(folder / "result.json")
    return {key: value for key, value in timeless(result).items() if key != "peak_memory_bytes"}


def evaluations_of(folder: Path) -> dict[str, Any]:
    """Every result file by its name."""
    return {path.name: read_json(path) for path in (folder / "evaluations").glob("*.json")}


def exported(output_dir: Path, *more: str) -> Path:
    """A finished run that saved its model."""
    plan, _ = run_tiny(output_dir, "export.model=true", *more)
    return plan.folder.path


def test_a_run_evaluated_later_is_a_run_evaluated_at_once(
    tmp_path: Path, command: Command, on: list[str]
) -> None:
    """Catches weights that are not those the run ended with, and a record that does not show the new evaluation."""
    at_once, result = run_tiny(tmp_path / "once", *on)
    later, _ = run_tiny(tmp_path / "later")
    code, out, _ = command(later.folder.path, *on)
    assert code == 0
    assert result_of(later.folder.path) == result_of(at_once.folder.path)
    assert evaluations_of(later.folder.path) == evaluations_of(at_once.folder.path)
    value = result["metrics"]["eval/pruned/perplexity/mine"]
    dense = result["metrics"]["eval/dense/perplexity/mine"]
    [line] = [line for line in out.splitlines() if "perplexity/mine " in line]
    assert f"{value:.4g}" in line
    assert f"{dense:.4g}" in line
    assert "pruned" in out
    assert "dense" in out


def test_a_moved_run_is_evaluated_where_it_is(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches results that go where the run was made, or into a new folder, and a run that is pruned again."""
    plan, _ = run_tiny(tmp_path / "made")
    moved = tmp_path / "elsewhere" / plan.folder.id
    moved.parent.mkdir()
    shutil.move(plan.folder.path, moved)
    before = {path: path.read_bytes() for path in (moved / "state").iterdir()}
    code, _, _ = command(moved, *on)
    assert code == 0
    assert not plan.folder.path.exists()
    assert [path.name for path in moved.parent.iterdir()] == [moved.name]
    assert len(evaluations_of(moved)) == 1
    assert {path: path.read_bytes() for path in (moved / "state").iterdir()} == before


def test_without_state_the_exported_model_is_evaluated(
    tmp_path: Path, command: Command, on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run pruned again for want of its state, and a partly deleted state that passes for the dense model."""
    at_once, _ = run_tiny(tmp_path / "once", *on)
    folder = exported(tmp_path / "later")
    (folder / "state" / "frozen_0002.safetensors").unlink()
    monkeypatch.setattr(pipeline, "run", _forbidden)
    assert command(folder, *on)[0] == 0
    assert result_of(folder) == result_of(at_once.folder.path)
    assert evaluations_of(folder) == evaluations_of(at_once.folder.path)
    assert command(folder, *on)[0] == 0


def test_without_weights_it_says_what_to_do(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches a run that is silently pruned again, or evaluated as the dense model."""
    plan, _ = run_tiny(tmp_path / "made")
    shutil.rmtree(plan.folder.state)
    code, _, told = command(plan.folder.path, *on)
    assert code == 2
    assert "its weights are gone" in told
    assert "export.model=true" in told
    assert not plan.folder.state.exists()


def test_the_second_call_loads_nothing(
    tmp_path: Path, command: Command, on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an evaluation done twice, and a table that is only printed by the call that made it."""
    plan, _ = run_tiny(tmp_path / "made", "export.model=true")
    model = plan.folder.path / "model"
    calls = [[plan.folder.path, *on], [model, *on], [model, "--dense", "tiny", *on]]
    first = [command(*call)[1] for call in calls]
    no_loading(monkeypatch)
    for call, out in zip(calls, first, strict=True):
        code, again, _ = command(*call)
        assert code == 0
        assert "evaluated already" in again
        rows = [line for line in out.splitlines() if "perplexity/mine" in line]
        assert rows
        assert [line for line in again.splitlines() if "perplexity/mine" in line] == rows


def test_earlier_evaluations_stay(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches a record that loses what was evaluated before, or mixes two evaluations of one name."""
    plan, before = run_tiny(tmp_path / "made", *on)
    other = tmp_path / "other.jsonl"
    write_documents(other, seed=1)
    assert command(plan.folder.path, *perplexity_on(second=other))[0] == 0
    metrics = read_json(plan.folder.path / "result.json")["metrics"]
    for name in ("eval/pruned/perplexity/mine", "eval/dense/perplexity/mine"):
        assert metrics[name] == before["metrics"][name]
    assert {"eval/pruned/perplexity/second", "eval/dense/perplexity/second"} <= metrics.keys()
    assert len(evaluations_of(plan.folder.path)) == 2


def test_a_saved_model_beside_the_dense_one(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches numbers that differ from those of the run that saved the model, and two models that share a file."""
    folder = exported(tmp_path / "made", *on)
    metrics = read_json(folder / "result.json")["metrics"]
    model = folder / "model"
    code, out, _ = command(model, "--dense", "tiny", *on)
    assert code == 0
    [found] = evaluations_of(model).values()
    assert found["metrics"]["perplexity/mine"] == metrics["eval/pruned/perplexity/mine"]
    assert found["dense"]["metrics"]["perplexity/mine"] == metrics["eval/dense/perplexity/mine"]
    assert "dense" in out
    code, out, _ = command(model, *on)
    assert code == 0
    assert len(evaluations_of(model)) == 2
    assert "dense" not in out
    alone = next(it for it in evaluations_of(model).values() if "dense" not in it)
    assert alone["metrics"] == found["metrics"]
    assert sorted(path.name for path in (model / "evaluations").iterdir() if path.is_dir()) == sorted(
        name.removesuffix(".json") for name in evaluations_of(model)
    ), "a folder of windows each, and no scratch"


def test_another_model_in_the_same_folder_is_evaluated_anew(
    tmp_path: Path, command: Command, on: list[str]
) -> None:
    """Catches a result by place: weights that changed are another model."""
    folder = exported(tmp_path / "made") / "model"
    command(folder, *on)
    [first] = evaluations_of(folder).values()
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: -3 * weights[name]}, folder / "model.safetensors", {"format": "pt"})
    command(folder, *on)
    found = [it["metrics"]["perplexity/mine"] for it in evaluations_of(folder).values()]
    assert len(set(found)) == 2
    assert first["metrics"]["perplexity/mine"] in found
    command(folder, "dtype=bfloat16", *on)
    assert len(evaluations_of(folder)) == 3


def test_a_named_model_goes_to_outputs_or_out(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches results of named models that overwrite each other, and `--out` that is not heeded."""
    assert command("tiny", *on)[0] == 0
    assert command("tiny", "model.weights_seed=1", *on)[0] == 0
    folders = sorted((tmp_path / "outputs" / "evaluations").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("tiny-") for folder in folders)
    values = [it["metrics"]["perplexity/mine"] for path in folders for it in evaluations_of(path).values()]
    assert len(set(values)) == 2
    assert command("tiny", "--out", tmp_path / "mine", *on)[0] == 0
    [kept] = evaluations_of(tmp_path / "mine").values()
    assert kept["metrics"]["perplexity/mine"] in values


def test_never_two_models_in_memory(
    tmp_path: Path, command: Command, on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a dense model that is still held while the other one is loaded."""
    import gc
    import weakref

    folder = exported(tmp_path / "made") / "model"
    held: list[weakref.ref[Any]] = []
    alive = []

    def watched(*given: Any) -> Any:
        gc.collect()
        alive.append(sum(one() is not None for one in held))
        model = load_model(*given)
        held.append(weakref.ref(model.model))
        return model

    monkeypatch.setattr(eval_model, "load_model", watched)
    assert command(folder, "--dense", "tiny", *on)[0] == 0
    assert alive == [0, 0]


def test_what_fails_is_named_and_the_rest_counts(
    tmp_path: Path, command: Command, on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failed part that ends with exit code 0, is passed over, or is not tried again."""
    folder = exported(tmp_path / "made")
    whole = Perplexity.evaluate

    def partly(self: Perplexity, task: Task) -> Outcome:
        outcome = whole(self, task)
        return Outcome(outcome.metrics, {"perplexity/lost": "no luck"}, ["a remark"])

    monkeypatch.setattr(Perplexity, "evaluate", partly)
    for place in (folder, folder / "model"):
        code, out, _ = command(place, *on)
        assert code == 1
        assert "failed  perplexity/lost: no luck" in out
        assert "note    a remark" in out
        assert any("perplexity/mine" in line for line in out.splitlines())
    monkeypatch.setattr(Perplexity, "evaluate", whole)
    for place in (folder, folder / "model"):
        code, out, _ = command(place, *on)
        assert code == 0
        assert "failed" not in out


def test_only_what_failed_of_a_model_is_missing(
    tmp_path: Path, command: Command, on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one evaluator's failure that takes the others along."""
    other = tmp_path / "other.jsonl"
    write_documents(other, seed=1)
    node = f"{{_target_:reprune.evaluation.perplexity.Perplexity,texts:{{other:'{other}'}},length:16,num_windows:2}}"
    whole = Perplexity.evaluate

    def failing(self: Perplexity, task: Task) -> Outcome:
        from reprune.errors import RunError

        if "other" in task.texts:
            raise RunError("no luck")
        return whole(self, task)

    monkeypatch.setattr(Perplexity, "evaluate", failing)
    code, out, _ = command("tiny", *on, f"+evaluation.second={node}")
    assert code == 1
    assert "failed  second: no luck" in out
    assert any("perplexity/mine" in line for line in out.splitlines())


def test_an_evaluator_that_compares_needs_a_dense_model(
    tmp_path: Path, command: Command, on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a comparison without anything to compare with, found out after the model is loaded."""
    no_loading(monkeypatch)
    monkeypatch.setattr(Perplexity, "needs_dense", True, raising=False)
    code, _, told = command("tiny", *on)
    assert code == 2
    assert "evaluation.perplexity: compares a model with the dense one" in told
    assert "--dense MODEL" in told


def test_prompts_that_outgrow_the_context_are_told_before_loading(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an evaluator whose own check of the model's room is not asked."""
    path = tmp_path / "mine.jsonl"
    write_documents(path)
    gone = [f"~evaluation.generation.texts.{name}" for name in ("web", "wiki")]
    no_loading(monkeypatch)
    code, _, told = command(
        "tiny", "evaluation=generation", *gone, f"+evaluation.generation.texts.mine={path}",
        "evaluation.generation.num_tokens=500",
    )  # fmt: skip
    assert code == 2
    assert "evaluation.generation.num_tokens: longer than the model's context" in told


def test_generation_of_a_run_beside_its_dense_model(tmp_path: Path, command: Command) -> None:
    """Catches an evaluator's files that do not arrive in the run's folder, and a comparison that is left out."""
    path = tmp_path / "mine.jsonl"
    write_documents(path)
    sizes = {"num_prompts": 3, "prompt_length": 8, "num_tokens": 6}
    choices = [f"evaluation.generation.{key}={value}" for key, value in sizes.items()]
    gone = [f"~evaluation.generation.texts.{name}" for name in ("web", "wiki")]
    plan, _ = run_tiny(tmp_path / "made")
    code, out, _ = command(
        plan.folder.path, "evaluation=generation", *gone, *choices, f"+evaluation.generation.texts.mine={path}"
    )  # fmt: skip
    assert code == 0
    [line] = [line for line in out.splitlines() if "greedy/rouge_l_dense" in line]
    assert "±" in line
    [file] = (plan.folder.path / "evaluations").glob("*/continuations.parquet")
    assert file.parent.with_suffix(".json").is_file()


def test_an_identity_that_changed_is_told(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches results of another model or version filed under a run."""
    folder = exported(tmp_path / "made")
    result = read_json(folder / "result.json")
    result["identity"]["results_version"] = -1
    (folder / "result.json").write_text(json.dumps(result))
    code, _, told = command(folder, *on)
    assert code == 2
    assert "results_version differ" in told
    assert "results_version was -1" in told
    assert f"reprune-eval {folder / 'model'}" in told


BAD: list[tuple[str, list[str], list[str]]] = [
    ("nowhere", ["evaluation=quick"], ["no such folder, and no model has this name", "smollm2_135m"]),
    ("tinny", ["evaluation=quick"], ["did you mean 'tiny'?"]),
    ("evaluation=quick", [], ["the run or the model comes first"]),
    ("empty", ["evaluation=quick"], ["neither a run nor a saved model"]),
    ("made", ["evaluation=quick"], ["neither a run nor a saved model", "it holds runs"]),
    ("RUN", [], ["nothing is chosen to evaluate"]),
    ("RUN", ["evaluation=none"], ["this suite holds no evaluator"]),
    ("RUN", ["evaluation=quik"], ["no such option", "did you mean 'quick'?"]),
    ("RUN", ["evaluaton=quick"], ["evaluaton: nothing that can be set here", "did you mean 'evaluation'?"]),
    ("RUN", ["evaluation=quick", "evaluation.perplexity.lenght=8"], ["did you mean 'length'?"]),
    ("RUN", ["evaluation=quick", "sparsity=0.7"], ["sparsity: this belongs to the run"]),
    ("RUN", ["evaluation=quick", "model.name=x"], ["model.name: this belongs to the run"]),
    ("RUN", ["evaluation=quick", "dtype=bfloat16"], ["dtype: this belongs to the run"]),
    ("RUN", ["evaluation=quick", "device=cpu"], ["device: this belongs to the run"]),
    ("RUN", ["evaluation=quick", "calibration@probes.x=web"], ["calibration@probes.x: this belongs"]),
    ("RUN", ["evaluation=quick", "--dense", "tiny"], ["--dense: a run has its own dense model"]),
    ("RUN", ["evaluation=quick", "--out", "here"], ["--out: a run has its own"]),
    ("RUN", ["evaluation=quick", "--dens", "tiny"], ["--dens: unknown", "did you mean '--dense'?"]),
    ("RUN", ["evaluation=quick,perplexity"], ["quick,perplexity"]),
    ("RUN", ["quick", "evaluation=quick"], ["quick: this is no override"]),
    ("tiny", ["evaluation=quick", "pruner=wanda"], ["pruner: nothing is pruned here"]),
    ("tiny", ["evaluation=quick", "model=smollm2_135m"], ["named by the first argument"]),
    ("tiny", ["evaluation=quick", "--dense", "tinny"], ["--dense: no such folder", "did you mean 'tiny'?"]),
    (
        "tiny",
        ["evaluation=quick", "--dense", "empty"],
        ["--dense.model.path: this folder has no config.json"],
    ),
    ("tiny", ["evaluation=quick", "dtype=float8"], ["dtype: unknown dtype"]),
    ("local", ["evaluation=quick"], ["model.path: has to be set"]),
    ("tiny", ["evaluation=summarisation"], ["evaluation.summaries.path: has to be set"]),
]


def test_bad_input_is_told_before_anything_is_loaded(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches exit code 0 or 1 for bad input, a trace, and a message that does not say what is meant."""
    plan, _ = run_tiny(tmp_path / "made")
    (tmp_path / "empty").mkdir()
    no_loading(monkeypatch)
    for place, words, wanted in BAD:
        code, _, told = command(plan.folder.path if place == "RUN" else place, *words)
        assert code == 2, (place, words, told)
        for phrase in wanted:
            assert phrase in told, (place, words, told)
        assert "Traceback" not in told


def test_a_run_that_is_not_finished_is_told(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches an evaluation of half a run."""
    plan, _ = run_tiny(tmp_path / "made")
    (plan.folder.path / "result.json").unlink()
    code, _, told = command(plan.folder.path, *on)
    assert code == 2
    assert "this run is not finished: killed" in told
    assert "run its own command again" in told


def test_a_renamed_run_is_told(tmp_path: Path, command: Command, on: list[str]) -> None:
    """Catches a record whose hash is read from a name that is not its own."""
    plan, _ = run_tiny(tmp_path / "made")
    renamed = plan.folder.path.with_name("best")
    plan.folder.path.rename(renamed)
    code, _, told = command(renamed, *on)
    assert code == 2
    assert f"rename it to {plan.folder.id}" in told


def test_a_dense_model_with_another_tokenizer_is_told(tmp_path: Path, command: Command) -> None:
    """Catches two models compared on different tokens."""
    path = tmp_path / "mine.jsonl"
    write_documents(path)
    folder = tmp_path / "other"
    from reprune.model.tiny import TinyModel

    shutil.copytree(TinyModel(add_bos=False).folder(), folder)
    code, _, told = command("tiny", "--dense", folder, *perplexity_on(mine=path))
    assert code == 2
    assert "--dense: its tokenizer makes other tokens" in told


def test_interrupted_and_out_of_memory(
    command: Command, on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a trace where a person stopped it, and an exit code of bad input for a device that is too small."""
    for error, code, words in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("too much"), 1, "failed  perplexity: too much"),
        (OSError(28, "No space left on device", "here"), 1, "failed: here: No space left on device"),
    ):

        def stop(*_: object, error: BaseException = error) -> NoReturn:
            raise error

        monkeypatch.setattr(eval_model, "load_model", stop)
        found, out, told = command("tiny", *on)
        assert found == code
        assert words in out + told


def test_help_says_what_it_does(command: Command) -> None:
    """Catches help that needs the source to be understood."""
    code, out, _ = command("--help")
    assert code == 0
    for words in ("RUN_OR_MODEL", "--dense", "--out", "RUN/evaluations/", "evaluation=perplexity"):
        assert words in out
