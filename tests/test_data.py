"""Descriptions of calibration text: numbers by hand, any order of windows, the run folder, `reprune-data`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from conftest import MakeModel
from helpers import TINY, plan_of, run_tiny, state_bytes, write_documents
from reprune import data_cli, pipeline
from reprune.calibration import describe as describing
from reprune.calibration.describe import describe, ngrams, perplexities, zipf_exponent
from reprune.calibration.source import TextSet
from reprune.compose import compose_run
from reprune.model.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer(True)
BOS, EOS = 0, 1
TEXT = (
    "model=tiny", "calibration=vocabulary", "calibration.num_sequences=3", "calibration.length=16",
    "probes.wiki=null", "probes.code=null", "evaluation=none",
)  # fmt: skip


def text_of(rows: list[list[int]], documents: int = 1) -> TextSet:
    """A calibration text with these ids."""
    ids = tuple(map(str, range(documents)))
    return TextSet("mine", "calibration", torch.tensor(rows), ids, {"name": "mine"}, "as_tokenised")


def windows_of(text: str, length: int) -> list[list[int]]:
    """Windows of a text's bytes."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def test_numbers_by_hand() -> None:
    """Catches special tokens that count, n-grams over a special token or a window's end, and shares of the wrong total."""
    a, b, c, d, e = 10, 11, 12, 13, 14
    found = describe(
        text_of([[BOS, a, b, a, b, a, b, EOS, c], [BOS, a, b, c, d, e, EOS, EOS, EOS]], 3), TOKENIZER
    )
    assert (found["windows"], found["length"], found["tokens"], found["documents"]) == (2, 9, 12, 3)
    assert found["documents_per_window"] == 1.5
    assert found["types"] == 5
    assert found["vocabulary_coverage"] == 5 / 256
    assert found["distinct_1"] == 5 / 12
    # ab ba ab ba ab | ab bc cd de
    assert found["distinct_2"] == 5 / 9
    # aba bab aba bab | abc bcd cde
    assert found["distinct_3"] == 5 / 7
    # abab baba abab | abcd bcde
    assert found["distinct_4"] == 4 / 5
    assert found["repetition"] == pytest.approx((1 / 3 + 0) / 2, abs=1e-15)
    assert found["duplicates"] == 0


def test_duplicates_by_hand() -> None:
    """Catches a window that is its own duplicate, and runs that are looked for in a part of the windows."""
    stream = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 258, (6, 200), generator=stream)
    rows[3] = rows[1]
    rows[5, 100:164] = rows[0, 7:71]
    rows[4, 100:163] = rows[2, 7:70]
    found = describe(text_of(rows.tolist()), TOKENIZER)
    assert found["duplicates"] == 2 / 6
    assert found["near_duplicates"] == 4 / 6, "rows 0, 1, 3 and 5; a run of 63 bytes is none"


def test_nothing_but_special_tokens() -> None:
    """Catches a division by zero where there is nothing to count."""
    found = describe(text_of([[BOS, EOS], [EOS, EOS]]), TOKENIZER)
    assert found["tokens"] == found["types"] == found["english"] == found["near_duplicates"] == 0
    for name in ("repetition", "distinct_1", "distinct_4", "zipf_exponent"):
        assert found[name] is None


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.7, 6.0])
def test_zipf_exponent_of_zipf_counts(exponent: float) -> None:
    """Catches an estimate that depends on the order of types or misses the exponent that made the counts."""
    counts = np.round(1e12 * np.arange(1, 201) ** -exponent).astype(np.int64)
    counts = counts[counts > 0]
    assert zipf_exponent(counts) == pytest.approx(exponent, abs=1e-3)
    assert zipf_exponent(counts[::-1].copy()) == zipf_exponent(counts)


def test_zipf_exponent_of_a_sample() -> None:
    """Catches an estimator that tokens drawn from Zipf's law lead astray."""
    odds = 1.0 / np.arange(1, 51)
    drawn = np.random.default_rng(0).choice(50, 200_000, p=odds / odds.sum())
    assert zipf_exponent(np.unique(drawn, return_counts=True)[1]) == pytest.approx(1.0, abs=0.01)


def test_zipf_exponent_is_the_most_likely() -> None:
    """Catches a root of the wrong equation."""
    counts = np.array([9, 4, 4, 1])
    best = zipf_exponent(counts)
    assert best is not None

    def likelihood(exponent: float) -> float:
        logs = np.log(np.arange(1, 5))
        return float(-exponent * (counts @ logs) - counts.sum() * np.log(np.exp(-exponent * logs).sum()))

    assert likelihood(best) > max(likelihood(best - 1e-3), likelihood(best + 1e-3))
    assert zipf_exponent(np.array([5])) is None


def test_share_of_english() -> None:
    """Catches a share of something else than windows."""
    english = "The children went to the river because the weather was so warm that day, and they swam. "
    german = "Die Kinder gingen an den Fluss, weil das Wetter an diesem Tag so warm war; sie schwammen. "
    rows = [*windows_of(english, 80)[:1], *windows_of(german, 80)[:1], *windows_of(english[5:], 80)[:1]]
    assert describe(text_of(rows), TOKENIZER)["english"] == pytest.approx(2 / 3)


ROWS = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, 6), min_size=length, max_size=length), min_size=1, max_size=8
    )
)


@given(ROWS, st.randoms(use_true_random=False))
def test_order_of_windows_does_not_matter(rows: list[list[int]], random: Any) -> None:
    """Catches sums and sets that depend on which window comes first."""
    mixed = rows.copy()
    random.shuffle(mixed)
    assert describe(text_of(rows), TOKENIZER) == describe(text_of(mixed), TOKENIZER)


@given(ROWS)
def test_ngrams_are_those_of_tuples(rows: list[list[int]]) -> None:
    """Catches numbers that two n-grams share, and n-grams left out."""
    flat = describing._flat(torch.tensor(rows), TOKENIZER)
    for size, (grams, places) in ngrams(flat, 4).items():
        wanted = Counter()
        for row in rows:
            for start in range(len(row) - size + 1):
                gram = tuple(row[start : start + size])
                if not {BOS, EOS} & set(gram):
                    wanted[gram] += 1
        found = Counter(tuple(flat[place : place + size].tolist()) for place in places.tolist())
        assert found == wanted
        assert sorted(Counter(grams.tolist()).values()) == sorted(wanted.values())


@given(ROWS)
def test_shares_are_shares(rows: list[list[int]]) -> None:
    """Catches a share below 0 or above 1, and a set without repetition that has some."""
    found = describe(text_of(rows), TOKENIZER)
    for name in ("vocabulary_coverage", "repetition", "distinct_1", "distinct_4", "duplicates", "english"):
        value = found[name]
        assert value is None or 0 <= value <= 1
    if found["distinct_4"] == 1:
        assert found["repetition"] == 0
    assert (found["duplicates"] == 0) == (len({tuple(row) for row in rows}) == len(rows))


def test_perplexity_by_hand(make_model: MakeModel) -> None:
    """Catches base 2, a mean over the wrong tokens, and quantiles of losses instead of windows."""
    model = make_model()
    rows = torch.randint(2, 258, (5, 12), generator=torch.Generator().manual_seed(0))
    odds = torch.log_softmax(model.logits(rows).double(), dim=-1)
    losses = -odds[:, :-1].gather(2, rows[:, 1:, None])[..., 0].mean(dim=1)
    found = perplexities(model, rows)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found["perplexity_min"] == pytest.approx(math.exp(losses.min()), rel=1e-5)
    assert found["perplexity_median"] == pytest.approx(math.exp(losses.median()), rel=1e-5)
    assert found["perplexity_max"] == pytest.approx(math.exp(losses.max()), rel=1e-5)
    other = perplexities(model, rows.flip(0))
    for name, value in found.items():
        assert other[name] == pytest.approx(value, rel=1e-6)


def test_perplexity_that_is_no_number(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches NaN in a record, and a run that ends because its text cannot be described."""
    model = make_model()
    rows = torch.full((2, 4), 5)
    assert set(perplexities(model, rows[:, :1]).values()) == {None}
    for value in (math.nan, math.inf, 800.0):
        monkeypatch.setattr(
            describing, "row_losses", lambda *_, value=value: torch.full((2,), value).double()
        )
        assert set(perplexities(model, rows).values()) == {None}

    def too_large(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(describing, "row_losses", too_large)
    assert set(perplexities(model, rows).values()) == {None}


def test_run_folder_holds_the_description(tmp_path: Path) -> None:
    """Catches a record without source, and perplexities of the pruned model or of held-out text."""
    plan, result = run_tiny(tmp_path)
    record = json.loads((plan.folder.path / "calibration.json").read_text())
    assert set(record["texts"]) == {"calibration/vocabulary", "probe/held_out"}
    assert record["overlap"] == result["overlap"]
    mask = record["texts"]["calibration/vocabulary"]
    assert mask["uses"] == ["mask", "reconstruction"]
    assert mask["source"]["text"] == "vocabulary"
    text = plan.texts(None).mask[0]
    assert mask["sha256"] == text.key
    model = pipeline.load_model(plan.source, plan.tokenizer, plan.device)
    assert mask["description"] == describe(text, plan.tokenizer, model)
    assert mask["description"]["perplexity"] > 1
    assert "perplexity" not in record["texts"]["probe/held_out"]["description"]
    assert result["seconds"]["describing"] >= 0


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("windows", [1, 2])
def test_resumed_run_has_the_same_description(
    tmp_path: Path, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a description made anew of half-pruned weights, or one that is missing after a kill."""
    whole, _ = run_tiny(tmp_path / "whole")
    wanted = (whole.folder.path / "calibration.json").read_bytes()
    plan = plan_of(tmp_path / "killed")

    def after_commit(done: int) -> None:
        if done == windows:
            raise Killed

    with pytest.raises(Killed):
        pipeline.run(plan, after_commit)
    path = plan.folder.path / "calibration.json"
    assert path.read_bytes() == wanted
    if windows == 1:
        path.unlink()
    else:
        monkeypatch.setattr(pipeline, "describe_run", None)
    pipeline.run(plan)
    assert path.read_bytes() == wanted


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`reprune-data` in this process."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(data_cli, "configure_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["reprune-data", *map(str, arguments)])
        data_cli.main()

    return call


def test_show(data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches numbers of another set than the run's, and samples that are not asked for."""
    data("show", "--samples", "1", *TEXT)
    printed = capsys.readouterr().out
    assert " 45  tokens, special ones left out" in printed
    assert "perplexity under the dense model" in printed
    assert "of the windows repeat probes.held_out" in printed
    assert "window 0\n<bos>" in printed
    assert "window 1" not in printed


def test_no_model_is_loaded_without_need(
    data: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches weights loaded for numbers that need none."""
    monkeypatch.setattr("reprune.data_setting.load_model", None)
    data("show", "--no-perplexity", *TEXT)
    assert "perplexity" not in capsys.readouterr().out


def test_compare(data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches rows that share a name or a set, overlap left out, and a table that says other than the file."""
    write_documents(tmp_path / "mine.jsonl")
    out = tmp_path / "tables" / "sets.csv"
    swept = [f"calibration.domain={tmp_path / 'mine.jsonl'}", "calibration.num_sequences=2,4"]
    data("compare", "--csv", out, *TEXT, "calibration=domain", *swept)
    table = pd.read_csv(out)
    assert list(table["set"]) == ["calibration.num_sequences=2", "calibration.num_sequences=4"]
    assert list(table["windows"]) == [2, 4]
    assert list(table["overlap"]) == [0, 0]
    assert (table["perplexity"] > 1).all()
    printed = capsys.readouterr().out
    assert "calibration.num_sequences=4" in printed
    data("compare", "--no-perplexity", "--no-overlap", *TEXT[:1], *TEXT[2:], "calibration=vocabulary,self_calibration",
         "probes.held_out=null")  # fmt: skip
    names = re.findall(r"^│ ?(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert names == ["vocabulary", "self_calibration"]


def test_saved_set_drives_a_run(data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a printed command that cannot be run or uses other ids, and a file without its source."""
    out = tmp_path / "sets" / "mine.safetensors"
    data("save", out, *TEXT)
    plan, _ = run_tiny(tmp_path / "a")
    assert torch.equal(load_file(out)["input_ids"], plan.texts(None).mask[0].tokens_NT)
    with safe_open(out, framework="pt") as stream:
        about = json.loads(stream.metadata()["reprune"])
    kept = about["texts"]["input_ids"]
    assert kept["source"]["text"] == "vocabulary"
    assert kept["sha256"] == plan.texts(None).mask[0].key
    assert kept["description"]["perplexity"] > 1
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[0] == "reprune"
    assert compose_run(command[1:]).config["calibration"]["path"] == str(out)
    later, _ = run_tiny(
        tmp_path / "b", "~calibration.num_sequences", "~calibration.length", "calibration=tokens",
        f"calibration.path={out}", "~calibration@probes.held_out",
    )  # fmt: skip
    assert torch.equal(later.texts(None).mask[0].tokens_NT, plan.texts(None).mask[0].tokens_NT)
    assert state_bytes(later.folder.path) == state_bytes(plan.folder.path)


def test_several_sets(data: Any, tmp_path: Path) -> None:
    """Catches sets that are not the ones that calibration.set names, or equal each other."""
    out = tmp_path / "mine.safetensors"
    data("save", out, "--sets", "0-2", "--no-perplexity", *TEXT)
    saved = [load_file(tmp_path / f"mine-{number}.safetensors")["input_ids"] for number in range(3)]
    plan = plan_of(tmp_path / "run", "calibration.set=2")
    assert torch.equal(saved[2], plan.texts(None).mask[0].tokens_NT)
    assert len({row.numpy().tobytes() for part in saved for row in part}) == 9
    assert not out.exists()


def test_generate(data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Catches generation without a word of progress, and text from another stream than a run's."""
    told: list[str] = []
    monkeypatch.setattr("reprune.data_setting.LOG.info", lambda text, *values: told.append(text % values))
    recipe = ["calibration=generated", "calibration.batch_size=2", "calibration.max_new_tokens=20", "calibration.language=null"]  # fmt: skip
    out = tmp_path / "own.safetensors"
    data("generate", out, *TEXT, *recipe, "threads=1")
    assert told
    assert told[-1] == "calibration: 48 of 48 tokens"
    plan = plan_of(tmp_path / "run", *recipe, "probes.held_out=null")
    model = pipeline.load_model(plan.source, plan.tokenizer, plan.device)
    assert torch.equal(load_file(out)["input_ids"], plan.texts(model).mask[0].tokens_NT)
    assert "calibration=tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "calibration=wikki"), ("no such option", "did you mean 'wiki'?")),
        (("show", *TEXT, "calibration.lenght=3"), ("calibration.lenght", "did you mean 'length'?")),
        (("show", *TEXT, "calibration.length=100000"), ("longer than the model's context", "at most 512")),
        (("compare", *TEXT[:1], "calibration=web,vocabulry"), ("no such option", "did you mean 'vocabulary'?")),
        (("save", "x.bin", *TEXT), ("x.bin", "*.safetensors")),
        (("save", "x.safetensors", *TEXT, "seed=0,1"), ("several values", "seed")),
        (("save", "x.safetensors", "--sets", "4-1", *TEXT), ("4-1", "0-4")),
        (("generate", "x.safetensors", *TEXT), ("no model writes this text", "reprune-data save")),
        (("save", __file__.replace(".py", ".safetensors"), "--wrong", *TEXT), ("--wrong",)),
        (("shwo",), ("shwo", "show")),
    ],
)  # fmt: skip
def test_bad_input(
    data: Any, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Catches a traceback, another exit code than 2, and a message that does not say what to do."""
    with pytest.raises(SystemExit) as end:
        data(*arguments)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert len(told.splitlines()) < 25
    for word in words:
        assert word in told


def test_save_does_not_write_over_a_released_set(data: Any, tmp_path: Path) -> None:
    """Catches a set that is gone because another one was given its name."""
    out = tmp_path / "mine.safetensors"
    data("save", out, "--no-perplexity", *TEXT)
    before = out.read_bytes()
    with pytest.raises(SystemExit) as end:
        data("save", out, "--no-perplexity", *TEXT, "seed=1")
    assert end.value.code == 2
    assert out.read_bytes() == before
    data("save", out, "--force", "--no-perplexity", *TEXT, "seed=1")
    assert out.read_bytes() != before


def test_every_tiny_override_is_known_to_the_tool(data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches overrides of a run that the tool refuses."""
    data("show", "--no-perplexity", "--samples", "0", *TINY)
    assert "windows" in capsys.readouterr().out
