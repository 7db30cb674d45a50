"""Run folders: identity, skipping, locks, status in words, the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers import perplexity_on, plan_of, run_tiny, state_bytes, write_documents
from reprune import pipeline
from reprune.engine import loop
from reprune.errors import RunError
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.perplexity import Perplexity
from reprune.run_folder import RunFolder, config_hash

KEYS = {"id", "status", "config_hash", "sparsity", "seconds", "peak_memory_bytes", "metrics"}

PERPLEXITY = {
    f"eval/{which}/{name}"
    for which in ("dense", "pruned")
    for name in (
        "perplexity/mine",
        *(f"perplexity_evaluation_noise/mine/{part}" for part in ("low", "high", "standard_error")),
    )
}
"""What the evaluation of one text adds to a run."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A user's text of 40 documents."""
    path = tmp_path / "mine.jsonl"
    write_documents(path)
    return path


def _forbidden(*_: object, **__: object) -> NoReturn:
    raise AssertionError("this must not be called")


def _hash(tmp_path: Path, *more: str) -> str:
    return config_hash(plan_of(tmp_path, *more).identity)


def test_hash_ignores_what_changes_no_number(tmp_path: Path, text: Path) -> None:
    """Catches a run that is done again because it is tracked, stored, evaluated or threaded differently."""
    plain = _hash(tmp_path)
    for same in (
        ["tracking=wandb", "tracking.mode=disabled"],
        [f"output_dir={tmp_path / 'elsewhere'}"],
        perplexity_on(mine=text),
        ["threads=2"],
        ["export.model=true", "export.masks=true"],
        ["experiment=another"],
        ["seed_data=0", "seed_training=0"],
        ["sparsity=0.5"],
    ):
        assert _hash(tmp_path, *same) == plain, same


def test_hash_changes_with_every_number_changer(tmp_path: Path) -> None:
    """Catches two different runs that would share a folder, the second of them skipped."""
    variants = [
        [], ["seed=1"], ["seed_data=1"], ["seed_training=1"], ["sparsity=0.6"], ["pattern=2to4"],
        ["pattern=4to8"], ["pruner=wanda"], ["pruner.damp=0.02"], ["model.weights_seed=1"],
        ["model.num_blocks=4"], ["calibration.num_sequences=4"], ["calibration.length=17"],
        ["calibration.bos=as_tokenised"], ["reconstruction.learning_rate=1e-3"], ["reconstruction=none", "reconstruction.epochs=0"],
        ["reconstruction.epochs=2"], ["reconstruction=br_gp_cr", "reconstruction.epochs=1"], ["dtype=bfloat16"],
        ["calibration@reconstruction_data=vocabulary", "reconstruction_data.num_sequences=5"],
    ]  # fmt: skip
    hashes = [_hash(tmp_path, *variant) for variant in variants]
    assert len(set(hashes)) == len(variants)


def test_hash_follows_the_texts_content(tmp_path: Path, text: Path) -> None:
    """Catches identity by path: an edited text must be another run, a copied one the same."""
    use = ["calibration=domain", "calibration.num_sequences=3", "calibration.length=16"]
    first = _hash(tmp_path, *use, f"calibration.domain={text}")
    copy = tmp_path / "copies" / text.name
    copy.parent.mkdir()
    copy.write_bytes(text.read_bytes())
    assert _hash(tmp_path, *use, f"calibration.domain={copy}") == first
    text.write_text(text.read_text().replace("a", "b", 1))
    assert _hash(tmp_path, *use, f"calibration.domain={text}") != first


def test_hash_follows_the_field_that_is_read(tmp_path: Path) -> None:
    """Catches one file read by two of its fields, other documents, under one hash."""
    path = tmp_path / "two.jsonl"
    write_documents(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "title": row["text"][::-1]}) + "\n" for row in rows))
    use = ["calibration=domain", "calibration.num_sequences=3", "calibration.length=16"]
    hashes = {
        _hash(tmp_path, *use, f"calibration.domain={path}", f"calibration.text_field={name}")
        for name in ("text", "title")
    }
    assert len(hashes) == 2


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.none()), min_size=2)
)
def test_hash_does_not_depend_on_order(identity: dict[str, Any]) -> None:
    """Catches a hash of the order in which keys were written."""
    assert config_hash(identity) == config_hash(dict(reversed(identity.items())))
    changed = {**identity, next(iter(identity)): "something else"}
    assert config_hash(changed) != config_hash(identity)


def test_finished_run_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a finished run that loads its model again, or whose record is written a second time."""
    plan, result = run_tiny(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in plan.folder.path.rglob("*") if path.is_file()}
    monkeypatch.setattr(pipeline, "load_model", _forbidden)
    _, again = run_tiny(tmp_path, "tracking=wandb", "experiment=other")
    assert again == result
    changed = [
        str(path) for path, time in times.items() if path.stat().st_mtime_ns != time and path.name != ".lock"
    ]
    assert not changed


def test_new_evaluation_needs_no_pruning(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation that is part of the run's identity or starts the pruning over."""
    plan, first = run_tiny(tmp_path)
    before = state_bytes(plan.folder.path)
    assert not any(name.startswith("eval/") for name in first["metrics"])
    monkeypatch.setattr(loop.BlockPruning, "run", _forbidden)
    monkeypatch.setattr(loop.Fit, "run", _forbidden)
    again, second = run_tiny(tmp_path, *perplexity_on(mine=text))
    assert again.folder.path == plan.folder.path
    assert set(second["metrics"]) - set(first["metrics"]) == PERPLEXITY
    assert {name: second["metrics"][name] for name in first["metrics"]} == first["metrics"]
    assert second["seconds"] == first["seconds"], "the time of a run is that of its pruning"
    assert state_bytes(plan.folder.path) == before


def test_later_evaluation_equals_evaluation_at_once(tmp_path: Path, text: Path) -> None:
    """Catches an evaluation of the dense, or of half-restored weights, on a finished run."""
    run_tiny(tmp_path / "a")
    _, later = run_tiny(tmp_path / "a", *perplexity_on(mine=text))
    _, at_once = run_tiny(tmp_path / "b", *perplexity_on(mine=text))
    assert later["metrics"] == at_once["metrics"]
    assert later["metrics"]["eval/pruned/perplexity/mine"] != later["metrics"]["eval/dense/perplexity/mine"]


@pytest.mark.parametrize("first_count", [2, 4])
def test_result_shows_the_evaluation_asked_for_last(tmp_path: Path, text: Path, first_count: int) -> None:
    """Catches two evaluations of one name of which the record shows whichever file sorts last."""
    windows = "evaluation.perplexity.num_windows"
    run_tiny(tmp_path / "a", *perplexity_on(mine=text), f"{windows}={first_count}")
    _, second = run_tiny(tmp_path / "a", *perplexity_on(mine=text), f"{windows}={6 - first_count}")
    _, alone = run_tiny(tmp_path / "b", *perplexity_on(mine=text), f"{windows}={6 - first_count}")
    assert second["metrics"] == alone["metrics"]
    _, first = run_tiny(tmp_path / "c", *perplexity_on(mine=text), f"{windows}={first_count}")
    _, again = run_tiny(tmp_path / "a", *perplexity_on(mine=text), f"{windows}={first_count}")
    assert again["metrics"] == first["metrics"], "asked for a second time, after another one"


def test_failed_evaluation_is_no_number(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failed evaluation recorded as 0, as an older number, or not at all, and one not tried again."""
    working = Perplexity.evaluate
    run_tiny(tmp_path, *perplexity_on(mine=text), "evaluation.perplexity.num_windows=2")

    def breaks_pruned(self: Perplexity, task: Task) -> Outcome:
        pruned = any(bool((view.weight == 0).any()) for view in task.model.linears[0].values())
        assert pruned == (task.dense is not None)
        if pruned:
            raise RunError("it broke")
        return working(self, task)

    monkeypatch.setattr(Perplexity, "evaluate", breaks_pruned)
    plan, result = run_tiny(tmp_path, *perplexity_on(mine=text))
    assert result["failed_evaluations"] == {"perplexity": "it broke"}
    assert "eval/pruned/perplexity/mine" not in result["metrics"]
    assert "eval/dense/perplexity/mine" in result["metrics"]
    records = [json.loads(path.read_text()) for path in (plan.folder.path / "evaluations").glob("*.json")]
    assert {"failed", "finished"} == {record["status"] for record in records}
    monkeypatch.setattr(Perplexity, "evaluate", working)
    _, mended = run_tiny(tmp_path, *perplexity_on(mine=text))
    assert "failed_evaluations" not in mended
    assert mended["metrics"]["eval/pruned/perplexity/mine"] > 1


def test_two_writers(tmp_path: Path) -> None:
    """Catches two processes that write one folder; the second must say who holds it."""
    plan = plan_of(tmp_path)
    with plan.folder.locked():
        plan.folder.mark("running")
        holder = json.loads((plan.folder.path / "status.json").read_text())
        assert plan.folder.status().state == "running"
        with pytest.raises(RunError, match=f"process {holder['pid']} on {holder['host']}"):
            pipeline.run(plan)
    result = pipeline.run(plan)
    assert result["status"] == "finished", "a released lock must not stay in the way"


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def _kill_after(windows: int) -> Any:
    def after_commit(done: int) -> None:
        if done == windows:
            raise Killed

    return after_commit


@pytest.mark.parametrize("windows", [1, 2])
def test_killed_run_says_where(tmp_path: Path, windows: int) -> None:
    """Catches a dead run that still reads as running."""
    plan = plan_of(tmp_path)
    assert plan.folder.status().state == "empty"
    with pytest.raises(Killed):
        pipeline.run(plan, _kill_after(windows))
    status = RunFolder(plan.folder.path).status()
    assert (status.state, status.words) == ("killed", f"killed at block {windows}")
    with FileLock(plan.folder.path / ".lock", timeout=0):
        assert plan.folder.status().words == f"running at block {windows}"
    pipeline.run(plan)
    assert plan.folder.status().words == "finished"


def test_run_killed_while_it_resumes_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a place that is forgotten when a killed run begins again, and a record that is not yet there."""
    plan = plan_of(tmp_path)
    with pytest.raises(Killed):
        pipeline.run(plan, _kill_after(2))

    def killed(*_: object, **more: object) -> NoReturn:
        raise Killed

    monkeypatch.setattr(pipeline, "load_model", killed)
    with pytest.raises(Killed):
        pipeline.run(plan)
    assert plan.folder.status().words == "killed at block 2"


def test_run_killed_before_its_result_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder that says 'finished' without a result.json."""
    plan = plan_of(tmp_path)
    write_json = pipeline.write_json

    def killed_at_result(path: Path, content: Any) -> None:
        if path.name == "result.json":
            raise Killed
        write_json(path, content)

    monkeypatch.setattr(pipeline, "write_json", killed_at_result)
    with pytest.raises(Killed):
        pipeline.run(plan)
    assert plan.folder.status().state == "killed"


def test_failed_run_says_why(tmp_path: Path) -> None:
    """Catches a failure without reason, and one that takes the rows of earlier blocks with it."""
    plan = plan_of(tmp_path)

    def after_commit(done: int) -> None:
        if done == 2:
            raise RunError("block 2: the reason")

    with pytest.raises(RunError, match="the reason"):
        pipeline.run(plan, after_commit)
    status = plan.folder.status()
    assert status.state == "failed"
    assert "block 2" in status.words
    assert "the reason" in status.words
    assert [row["block"] for row in plan.folder.blocks()] == [0, 1]
    assert not (plan.folder.path / "result.json").exists()


@pytest.mark.parametrize("kind", ["learning_rate", "weights"])
def test_what_is_not_finite_fails_by_name(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches NaN that is pruned, trained or recorded as if it were a number."""
    if kind == "learning_rate":
        plan = plan_of(tmp_path, "reconstruction.learning_rate=1e38", "reconstruction.epochs=4")
        wanted = r"blocks? 0.*not finite.*learning_rate"
    else:
        load = pipeline.load_model

        def poisoned(*arguments: Any, **more: Any) -> Any:
            model = load(*arguments, **more)
            with torch.no_grad():
                model.linears[1]["mlp.up_proj"].stored[0, 0] = float("inf")
            return model

        monkeypatch.setattr(pipeline, "load_model", poisoned)
        plan = plan_of(tmp_path, "pruner=magnitude", "reconstruction=none")
        wanted = r"block 1.*mlp\.up_proj.*not finite"
    with pytest.raises(RunError, match=wanted):
        pipeline.run(plan)
    assert plan.folder.status().state == "failed"
    assert "not finite" in plan.folder.status().words


def test_result_and_rows_are_complete(tmp_path: Path, text: Path) -> None:
    """Catches a record that lacks what the reports and W&B are made of."""
    plan, result = run_tiny(tmp_path, "export.masks=true", "export.model=true", *perplexity_on(mine=text))
    folder = plan.folder.path
    assert json.loads((folder / "result.json").read_text()) == result
    assert set(result) >= KEYS
    assert result["id"] == folder.name
    assert folder.name.endswith(result["config_hash"])
    names = {
        f"{family}/{where}/{at}"
        for family in ("reconstruction", "reconstruction_relative")
        for where in ("calibration/vocabulary", "probe/held_out")
        for at in ("first", "last", "mean")
    }
    names |= PERPLEXITY
    assert set(result["metrics"]) == names
    assert set(result["sparsity"]["layers"]) == set(plan.rounds[-1])
    assert result["sparsity"]["total"] == pytest.approx(0.5, abs=1e-3)
    assert set(result["seconds"]) == set(result["peak_memory_bytes"])
    assert min(result["peak_memory_bytes"].values()) > 10 * 2**20
    rows = plan.folder.blocks()
    assert [row["block"] for row in rows] == [0, 1, 2]
    for row in rows:
        for moment in ("before", "after"):
            assert set(row[moment]["calibration"]["vocabulary"]) == {"error", "relative"}
            assert set(row[moment]["probe"]["held_out"]) == {"error", "relative"}
        assert row["training"][0]["epoch_losses"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["threads"] == 1
    masks = load_file(folder / "masks" / "masks.safetensors")
    removed = sum(int((~keep).sum()) for keep in masks.values())
    assert removed / sum(keep.numel() for keep in masks.values()) == pytest.approx(
        result["sparsity"]["total"]
    )


def test_exported_model_is_the_pruned_one(tmp_path: Path, text: Path) -> None:
    """Catches an export of the dense weights, or one that plain transformers does not load."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan, _ = run_tiny(tmp_path, "export.masks=true", "export.model=true", *perplexity_on(mine=text))
    folder = plan.folder.path
    model = AutoModelForCausalLM.from_pretrained(folder / "model", use_safetensors=True)
    assert AutoTokenizer.from_pretrained(folder / "model")("a")["input_ids"]
    for name, keep in load_file(folder / "masks" / "masks.safetensors").items():
        weight = model.get_submodule(f"model.layers.{name}").weight
        assert bool((weight[~keep] == 0).all()), name
        assert bool((weight[keep] != 0).any()), name


def test_relabelled_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder found by its label instead of its hash."""
    plan, result = run_tiny(tmp_path)
    renamed = plan.folder.path.with_name(f"mine-{result['config_hash']}")
    plan.folder.path.rename(renamed)
    monkeypatch.setattr(pipeline, "load_model", _forbidden)
    again, _ = run_tiny(tmp_path)
    assert again.folder.path == renamed


def test_saved_tokens_drive_an_identical_run(tmp_path: Path) -> None:
    """Catches a record whose token ids are not the ones used, or are used in another order or with a second BOS."""
    plan, result = run_tiny(tmp_path / "a")
    saved = plan.folder.path / "calibration.safetensors"
    stored = load_file(saved)
    texts = plan.texts(None)
    assert set(stored) == {"calibration/vocabulary", "probe/held_out", "input_ids"}
    assert torch.equal(stored["input_ids"], texts.mask[0].tokens_NT)
    assert torch.equal(stored["calibration/vocabulary"], texts.mask[0].tokens_NT)
    assert torch.equal(stored["probe/held_out"], texts.probes[0].tokens_NT)
    later, again = run_tiny(
        tmp_path / "b", "calibration=tokens", "~calibration.num_sequences", "~calibration.length",
        f"calibration.path={saved}", "~calibration@probes.held_out",
    )  # fmt: skip
    assert state_bytes(later.folder.path) == state_bytes(plan.folder.path)
    name = "reconstruction/calibration/{}/mean"
    assert again["metrics"][name.format("tokens")] == result["metrics"][name.format("vocabulary")]


def test_run_whose_state_was_freed_is_not_pruned_again(tmp_path: Path, text: Path) -> None:
    """Catches hours of pruning for an evaluation, of a run that was cleaned."""
    plan, _ = run_tiny(tmp_path)
    shutil.rmtree(plan.folder.path / "state")
    with pytest.raises(RunError, match=r"its state/ was freed.*reprune-eval"):
        run_tiny(tmp_path, *perplexity_on(mine=text))
    assert run_tiny(tmp_path)[1]["status"] == "finished"
    assert plan.folder.status().state == "finished"
