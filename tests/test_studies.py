"""The experiments that are ready to launch: every file passes the checks of a dry run, with models' configs only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoConfig

from reprune.cache import cache_root
from reprune.calibration import hub
from reprune.calibration.hub_places import Wanted
from reprune.check import check
from reprune.compose import compose_run
from reprune.config_files import config_root, options_of
from reprune.evaluation import field_texts, zero_shot
from reprune.evaluation.harness_tasks import Tasks
from reprune.model.tiny import byte_tokenizer
from reprune.run_plan import RunPlan

FOLDERS = ("study/", "self_calibration/", "calibration_data/")
READY = [name for name in options_of("experiments") if name.startswith(FOLDERS)]
MODELS = {
    "huggyllama/llama-7b": ("llama", 2048, True),
    "facebook/opt-125m": ("opt", 2048, True),
    "facebook/opt-6.7b": ("opt", 2048, True),
    "google/gemma-2b": ("gemma", 8192, True),
    "microsoft/phi-2": ("phi", 2048, False),
    "mistralai/Mistral-7B-v0.1": ("mistral", 32768, True),
    "meta-llama/Llama-3.1-8B": ("llama", 131072, True),
}
"""Architecture, context and whether the tokenizer adds BOS, by repository."""


def _described(folder: Path, architecture: str, context: int) -> None:
    """A config of few and small layers."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "head_dim": 8,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(
        architecture, **sizes, vocab_size=258, max_position_embeddings=context, bos_token_id=0, eos_token_id=1
    )
    config.save_pretrained(folder)


@lru_cache
def _documents(name: str) -> list[str]:
    """A few long documents, other ones for every name."""
    stream = random.Random(name)
    return ["".join(stream.choices("abcdefgh ", k=4400)) for _ in range(32)]


def _stream(wanted: Wanted) -> tuple[list[str], str]:
    """Few documents in place of many."""
    return _documents(f"{wanted.dataset} {wanted.config} {wanted.data_split}"), "hub fake"


def _rows(wanted: Wanted) -> tuple[list[str], str]:
    """What is evaluated on: the same documents, fewer."""
    documents, used = _stream(wanted)
    return documents[:2], used


@pytest.fixture(scope="module", autouse=True)
def _hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A hub of configs and tokenizers without weights, random texts, and tasks without examples."""
    place = tmp_path_factory.mktemp("hub")
    (place / "cache").mkdir()
    (place / "cache" / "wheels").symlink_to(cache_root() / "wheels")

    def snapshot(repository: str, **_: Any) -> str:
        architecture, context, add_bos = MODELS[repository]
        folder = place / repository.replace("/", "--")
        if not folder.is_dir():
            _described(folder, architecture, context)
            byte_tokenizer(add_bos).save_pretrained(folder)
        return str(folder)

    def tasks(names: list[str], *_: Any) -> Tasks:
        return Tasks(None, {name: [name] for name in names}, {name: {} for name in names}, dict.fromkeys(names, 1))  # type: ignore[arg-type]  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRUNE_CACHE", str(place / "cache"))
        patch.setattr(huggingface_hub, "snapshot_download", snapshot)
        patch.setattr(zero_shot, "resolve", tasks)
        patch.setattr(hub, "kept_or_streamed", _stream)
        patch.setattr(field_texts, "kept_or_streamed", _rows)
        yield
    hub._find.cache_clear()


def _plan(folder: Path, experiment: str, *more: str) -> RunPlan:
    """The checked plan of one run, of two windows a text."""
    overrides = [
        f"experiments={experiment}",
        "calibration.num_sequences=2",
        "threads=1",
        f"output_dir={folder}",
        *more,
    ]
    composed = compose_run(overrides)
    for probe in composed.config["probes"].values():
        if probe is not None:
            probe["num_sequences"] = 2
    return check(composed)


def _points(experiment: str) -> list[list[str]]:
    """The first point of a sweep, for every value another one that has it, and the last."""
    grid = {
        key: str(values).split(",")
        for key, values in compose_run([f"experiments={experiment}"]).hydra["params"].items()
    }
    first = {key: values[0] for key, values in grid.items()}
    others = [{**first, key: value} for key, values in grid.items() for value in values[1:]]
    points = [first, *others, {key: values[-1] for key, values in grid.items()}]
    return [list(it) for it in dict.fromkeys(tuple(f"{k}={v}" for k, v in point.items()) for point in points)]


@pytest.mark.parametrize("experiment", READY)
def test_passes_a_dry_run(experiment: str, tmp_path: Path) -> None:
    """Catches keys that an option of the grid does not have, windows beyond a context, and documents with two roles."""
    points = _points(experiment)
    plans = [_plan(tmp_path, experiment, *point) for point in points]
    assert len({plan.folder.id for plan in plans}) == len(points), "points that are the same run"
    assert not list(tmp_path.iterdir())
    for plan in plans:
        names = [request.name for request in plan.requests if request.use == "probes"]
        assert len(set(names)) == len(names) >= 1, "every experiment measures on text it does not fit"
        texts: dict[tuple[str, str], set[int]] = {}
        for source in (it.source for it in plan.requests):
            if isinstance(source, hub.HubText):
                texts.setdefault((source.dataset, source.data_split), set()).add(source.num_documents)
        # The part that a document belongs to depends on which others there are.
        assert all(len(counts) == 1 for counts in texts.values()), texts


@pytest.mark.parametrize("experiment", READY)
def test_says_how_to_launch_it(experiment: str) -> None:
    """Catches a study whose cost shows only on the bill."""
    lines = (config_root() / "experiments" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    told = "\n".join(line for line in lines[: lines.index("defaults:")] if line.startswith("# "))
    assert f"# reprune experiments={experiment}\n" in told
    assert "GPU-hour" in told
    assert "A100" in told


def test_everything_the_papers_did_is_there() -> None:
    """Catches a model or a source of a study that no file runs."""
    run: dict[str, set[str]] = {}
    for experiment in READY:
        composed = compose_run([f"experiments={experiment}"])
        for key in ("model", "calibration"):
            swept = str(composed.hydra["params"].get(key, composed.choices[key])).split(",")
            run.setdefault(f"{experiment.split('/')[0]} {key}", set()).update(swept)
    assert run["study model"] == {"llama_7b", "opt_125m"}
    assert run["self_calibration model"] == {"gemma_2b", "phi_2", "opt_6_7b", "mistral_7b", "llama3_1_8b"}
    assert run["self_calibration calibration"] >= {
        "c4", "wikitext103", "vocabulary", "cosmopedia", "self_calibration",
    }  # fmt: skip
    assert run["calibration_data calibration"] == {
        "c4", "cnn_dailymail", "redpajama", "refinedweb", "wikipedia",
    }  # fmt: skip


@pytest.mark.parametrize("model", ["llama_7b", "opt_125m"])
def test_samples_are_added_to_the_study(model: str, tmp_path: Path) -> None:
    """Catches self-generated samples in place of C4's, in the mask data, or measured on other text than without them."""
    plan = _plan(tmp_path, f"study/generated_samples_{model}")
    without = _plan(tmp_path, f"study/{model}")
    by_use = {
        use: [it for it in plan.requests if it.use == use] for use in ("mask", "reconstruction", "probes")
    }
    [mask], [c4, generated] = by_use["mask"], sorted(by_use["reconstruction"], key=lambda it: it.name)
    assert c4.source == mask.source, "the very windows of the mask data"
    assert generated.source.length == c4.source.length
    assert generated.source.bos == c4.source.bos
    assert [it.identity for it in by_use["probes"]] == [
        it.identity for it in without.requests if it.use == "probes"
    ]


@pytest.mark.parametrize("model", ["llama_7b", "opt_125m"])
def test_pitfall_is_measured_on_test_text(model: str, tmp_path: Path) -> None:
    """Catches probes of text that the study's test errors are not of."""
    plan = _plan(tmp_path, f"study/pitfall_{model}")
    probes = {it.name: it.source for it in plan.requests if it.use == "probes"}
    assert {name: probe.data_split for name, probe in probes.items()} == {  # type: ignore[attr-defined]
        "wikitext2": "test", "ptb": "test", "c4": "validation",
    }  # fmt: skip
    assert {probe.length for probe in probes.values()} == {1024}
