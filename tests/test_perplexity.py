"""Perplexity: the field's texts, windows and documents, the noise of windows, each held against plain computation."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from torch import Tensor, nn

from conftest import MakeModel
from helpers import plan_of, write_documents
from reprune.build import build
from reprune.compose import compose_run
from reprune.errors import ConfigError, RunError
from reprune.evaluation import perplexity
from reprune.evaluation.bootstrap import noise_of_ratio
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.field_texts import FieldText
from reprune.evaluation.perplexity import Perplexity
from reprune.evaluation.texts import ScoredSet, scored_of, spans
from reprune.model.loading import LoadedModel
from reprune.model.tiny import byte_tokenizer

WITH_BOS, WITHOUT = byte_tokenizer(add_bos=True), byte_tokenizer(add_bos=False)
WIKI = ["", " = One = \n", "", " a line of the first article \n", " = = Section = = \n", "", " more of it \n", "", " = Two = \n", "", " a line of the first article \n"]  # fmt: skip
PTB = ["no it was n't black monday", "but while the new york stock exchange did n't fall apart", "no it was n't black monday"]  # fmt: skip
C4 = [f"Document {number} has\ntwo lines. " + "word " * number for number in range(9)]


@pytest.fixture(autouse=True)
def _caches_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of the machine's user is read or written, but that of the tiny models."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


def _evaluate(folder: Path, model: LoadedModel, evaluator: Perplexity, tokenizer: Any = WITH_BOS) -> Outcome:
    folder.mkdir(exist_ok=True)
    texts = evaluator.cut(tokenizer, "evaluation.perplexity")
    return evaluator.evaluate(Task(model, texts, folder, None, lambda done, total: None))


def _losses(model: LoadedModel, ids: Tensor) -> Tensor:
    """Of every token of one row but the first, from the whole logits, float64."""
    logits = model.logits(ids[None])[0, :-1].double()
    return nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def _mirrors(folder: Path) -> dict[str, Path]:
    """Copies of the three data sets' repositories with a few rows each."""
    files = {name: folder / name for name in ("wikitext2", "ptb", "c4")}
    wiki = files["wikitext2"] / "wikitext-2-raw-v1"
    wiki.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": WIKI}), wiki / "test-00000-of-00001.parquet")
    ptb = files["ptb"] / "penn_treebank" / "test"
    ptb.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"sentence": PTB}), ptb / "0000.parquet")
    (files["c4"] / "en").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in C4)
    (files["c4"] / "en" / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(lines.encode()))
    return files


def _field(*overrides: str) -> Perplexity:
    node = compose_run(["evaluation=field", *overrides]).config["evaluation"]["field"]
    made: Perplexity = build(node, "evaluation.field")
    return made


@pytest.mark.parametrize("bos", ["each_window", "as_tokenised"])
def test_joined_by_hand(make_model: MakeModel, tmp_path: Path, bos: Any) -> None:
    """Catches another joiner, a BOS too many or too few, a mean of windows' perplexities, windows that are no rows."""
    model = make_model()
    documents = write_documents(tmp_path / "a.jsonl", count=5, words=7)
    evaluator = Perplexity(texts={"a": str(tmp_path / "a.jsonl")}, length=12, num_windows=9, bos=bos)
    outcome = _evaluate(tmp_path / "out", model, evaluator)
    ids = torch.tensor(
        WITH_BOS("\n\n".join(documents), add_special_tokens=bos == "as_tokenised")["input_ids"]
    )
    content = 12 if bos == "as_tokenised" else 11
    rows = [ids[start * content : (start + 1) * content] for start in range(9)]
    if bos == "each_window":
        rows = [torch.cat([torch.tensor([WITH_BOS.bos_token_id]), row]) for row in rows]
    losses = torch.stack([_losses(model, row) for row in rows])
    assert outcome.metrics["perplexity/a"] == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    stored = pd.read_parquet(tmp_path / "out" / "windows_a.parquet")
    assert list(stored.columns) == ["window", "tokens", "nll"]
    assert stored["tokens"].tolist() == [11] * 9
    assert stored["nll"].to_numpy() == pytest.approx(losses.sum(dim=1).numpy(), rel=1e-6)
    low, high = (outcome.metrics[f"perplexity_evaluation_noise/a/{end}"] for end in ("low", "high"))
    assert low < outcome.metrics["perplexity/a"] < high


def test_batches_change_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows that depend on how many go through at once."""
    model = make_model()
    write_documents(tmp_path / "a.jsonl")
    evaluator = Perplexity(texts={"a": str(tmp_path / "a.jsonl")}, length=12, num_windows=7)
    once = _evaluate(tmp_path / "once", model, evaluator)
    monkeypatch.setattr(perplexity, "rows_a_pass", lambda model, length: 2)
    again = _evaluate(tmp_path / "again", model, evaluator)
    assert again.metrics == pytest.approx(once.metrics, rel=1e-6)
    frames = [pd.read_parquet(tmp_path / name / "windows_a.parquet") for name in ("once", "again")]
    pd.testing.assert_frame_equal(*frames, rtol=1e-6)


def test_a_single_window_has_no_interval(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches an interval of width zero, or NaN, where nothing is known of other windows."""
    write_documents(tmp_path / "a.jsonl")
    evaluator = Perplexity(texts={"a": str(tmp_path / "a.jsonl")}, length=12, num_windows=1)
    assert set(_evaluate(tmp_path / "out", make_model(), evaluator).metrics) == {"perplexity/a"}


def test_a_text_that_failed(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text that takes the others with it, and a number in place of a failure."""
    for number, name in enumerate("ab"):
        write_documents(tmp_path / f"{name}.jsonl", seed=number)
    evaluator = Perplexity(texts={name: str(tmp_path / f"{name}.jsonl") for name in "ab"}, length=12)
    evaluator = replace(evaluator, num_windows=3)
    bad = evaluator.cut(WITH_BOS, "e")["a"].tokens_NT
    working = perplexity.token_losses

    def breaks(model: LoadedModel, tokens: Tensor) -> Tensor:
        losses = working(model, tokens)
        return losses * math.nan if torch.equal(tokens, bad) else losses

    monkeypatch.setattr(perplexity, "token_losses", breaks)
    outcome = _evaluate(tmp_path / "out", make_model(), evaluator)
    assert set(outcome.failed) == {"perplexity/a"}
    assert "perplexity/b" in outcome.metrics
    assert not [name for name in outcome.metrics if "/a" in name]
    monkeypatch.setattr(perplexity, "token_losses", lambda model, tokens: working(model, tokens) * math.inf)
    with pytest.raises(RunError, match="not finite"):
        _evaluate(tmp_path / "none", make_model(), evaluator)


@given(st.integers(0, 60), st.integers(2, 12), st.integers(1, 12), st.integers(0, 1))
def test_every_token_is_scored_once(num_tokens: int, content: int, stride: int, first: int) -> None:
    """Catches tokens skipped or counted twice at a seam, and less context than the stride leaves."""
    stride = min(stride, content - first)
    seen: list[int] = []
    for start, end, scored in spans(num_tokens, content, stride, first):
        assert 0 <= start <= scored < end <= num_tokens
        assert end - start <= content
        for token in range(scored, end):
            assert token - start >= min(token, content - stride)
            seen.append(token)
    assert seen == list(range(first, num_tokens))


@pytest.mark.parametrize("bos", ["each_window", "as_tokenised"])
@pytest.mark.parametrize("stride", [None, 3, 9])
def test_documents_by_brute_force(
    make_model: MakeModel, tmp_path: Path, bos: Any, stride: int | None
) -> None:
    """Catches context from another document, tokens counted that fill a window up, and documents that weigh alike."""
    model, tokenizer = make_model(), WITHOUT
    texts = [
        "short",
        "x" * 10,
        "a longer one, of some windows",
        "",
        "b",
        "the last of them, longer still than that",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    evaluator = Perplexity(texts={"a": str(path)}, mode="documents", length=10, stride=stride, bos=bos)
    outcome = _evaluate(tmp_path / "out", model, evaluator, tokenizer)
    head = [tokenizer.bos_token_id] if bos == "each_window" else []
    content = 10 - len(head)
    step = content // 2 if stride is None else stride
    sums, counts = [], []
    for text in filter(None, texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        total, count, end = 0.0, 0, min(content, len(ids))
        for token in range(1 - len(head), len(ids)):
            while token >= end:
                end = min(end + step, len(ids))
            context = torch.tensor([*head, *ids[max(0, end - content) : token + 1]])
            total += float(_losses(model, context)[-1])
            count += 1
        if count:
            sums.append(total)
            counts.append(count)
    expected = math.exp(sum(sums) / sum(counts))
    assert outcome.metrics["perplexity/a"] == pytest.approx(expected, rel=1e-5)
    stored = pd.read_parquet(tmp_path / "out" / "windows_a.parquet")
    assert stored["tokens"].sum() == sum(counts)
    by_document = stored.groupby("document")["nll"].sum()
    assert by_document.to_numpy() == pytest.approx(sums, rel=1e-5)
    noise = noise_of_ratio(np.array(sums), np.array(counts), np.exp)
    assert noise is not None
    assert outcome.metrics["perplexity_evaluation_noise/a/high"] == pytest.approx(noise.high, rel=1e-4)


def test_identity_says_what_is_scored(tmp_path: Path) -> None:
    """Catches results of another stride, mode or text read from the cache."""
    write_documents(tmp_path / "a.jsonl", count=4, words=9)
    plain = Perplexity(texts={"a": str(tmp_path / "a.jsonl")}, length=12)
    variants = [plain, *(replace(plain, mode="documents", stride=stride) for stride in (4, 5)), replace(plain, length=13)]  # fmt: skip
    found = [variant.identity(variant.cut(WITH_BOS, "e")) for variant in variants]
    assert len({json.dumps(identity) for identity in found}) == 4
    [cut] = variants[1].cut(WITH_BOS, "e").values()
    assert isinstance(cut, ScoredSet)
    assert replace(cut, scored_NT=~cut.scored_NT).key != cut.key
    assert scored_of(plain.cut(WITH_BOS, "e")["a"]).all()


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"stride": 4}, "stride"),
        ({"mode": "sliding"}, "mode"),
        ({"mode": "documents", "stride": 0}, "stride"),
        ({"length": 2}, "length"),
        ({"texts": {}}, "texts"),
    ],
)
def test_wrong_choices(wrong: dict[str, Any], key: str) -> None:
    """Catches a choice that nothing reads, or that cannot be."""
    with pytest.raises(ConfigError) as caught:
        Perplexity(**{"texts": {"a": "web"}, **wrong})
    assert caught.value.key == key


def test_stride_that_leaves_no_context(tmp_path: Path) -> None:
    """Catches tokens that are scored with nothing before them."""
    write_documents(tmp_path / "a.jsonl")
    evaluator = Perplexity(texts={"a": str(tmp_path / "a.jsonl")}, mode="documents", length=12, stride=12)
    with pytest.raises(ConfigError, match="without any before them") as caught:
        evaluator.cut(WITHOUT, "evaluation.mine")
    assert caught.value.key == "evaluation.mine.stride"
    assert replace(evaluator, stride=11).cut(WITHOUT, "e")
    assert replace(evaluator, stride=11, bos="each_window").cut(WITHOUT, "e")


def test_noise_of_windows() -> None:
    """Catches noise that is not that of a mean, changes between calls, or is there for a single window."""
    stream = np.random.default_rng(0)
    counts = np.full(400, 7.0)
    values = stream.normal(3, 0.5, 400)
    noise = noise_of_ratio(values * counts, counts)
    assert noise is not None
    error = values.std(ddof=1) / 20
    assert noise.standard_error == pytest.approx(error, rel=0.1)
    assert noise.high - noise.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert noise.low < values.mean() < noise.high
    assert noise_of_ratio(values * counts, counts) == noise
    weighted = noise_of_ratio(np.array([1.0, 300.0]), np.array([1.0, 100.0]))
    assert weighted is not None
    assert (weighted.low, weighted.high) == (1, 3)
    assert noise_of_ratio(np.ones(1), np.ones(1)) is None
    assert noise_of_ratio(np.array([1.0, 800.0]), np.ones(2), np.exp) is None
    same = noise_of_ratio(np.ones(5), np.full(5, 2.0))
    assert same is not None
    assert (same.low, same.high, same.standard_error) == (0.5, 0.5, 0)


def test_field_texts_by_hand(tmp_path: Path) -> None:
    """Catches stripped rows, blank ones or repeated ones left out, another joiner, another number of windows."""
    mirrors = _mirrors(tmp_path / "mirrors")
    given_ = [f"evaluation.field.texts.{name}.mirror={path}" for name, path in mirrors.items()]
    evaluator = _field(*given_, "evaluation.field.length=8", "evaluation.field.texts.c4.num_rows=7")
    expected = {"wikitext2": "\n\n".join(WIKI), "ptb": " ".join(PTB), "c4": " ".join(C4[:7])}
    texts = evaluator.cut(WITH_BOS, "evaluation.field")
    for name, joined in expected.items():
        ids = WITH_BOS(joined)["input_ids"]
        rows = torch.tensor(ids[: len(ids) // 8 * 8]).view(-1, 8)
        assert torch.equal(texts[name].tokens_NT, rows), name
        assert texts[name].source["used"] == "mirror"
        assert texts[name].bos == "as_tokenised"
    few = {name: replace(entry, max_windows=2) for name, entry in evaluator.texts.items()}  # type: ignore[type-var]
    capped = replace(evaluator, texts=few)
    assert {len(text.tokens_NT) for text in capped.cut(WITH_BOS, "e").values()} == {2}
    assert {len(text.tokens_NT) for text in replace(capped, num_windows=1).cut(WITH_BOS, "e").values()} == {1}
    by_article = replace(evaluator, mode="documents", num_windows=None).cut(WITH_BOS, "e")["wikitext2"]
    assert isinstance(by_article, ScoredSet)
    assert by_article.document_N.max() == 1
    assert len(by_article.document_ids) == 2


def test_record_says_where_a_text_is_from(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches a number of which nobody can tell what revision of a text it is of."""
    mirrors = _mirrors(tmp_path / "mirrors")
    gone = [f"~evaluation.field.texts.{name}" for name in ("wikitext2", "c4")]
    place = f"evaluation.field.texts.ptb.mirror={mirrors['ptb']}"
    outcome = _evaluate(tmp_path / "out", make_model(), _field(*gone, place, "evaluation.field.length=8"))
    assert "text 'ptb': mirror" in outcome.notes
    assert "perplexity/ptb" in outcome.metrics


def test_fields_are_the_studys() -> None:
    """Catches a split, a joiner or a count that is not the field's: perplexities would not compare."""
    evaluator = _field()
    found = {name: entry for name, entry in evaluator.texts.items() if isinstance(entry, FieldText)}
    told = {name: (it.data_split, it.joiner, it.num_rows, it.max_windows) for name, it in found.items()}
    assert told == {
        "wikitext2": ("test", "\n\n", None, None),
        "ptb": ("test", " ", None, None),
        "c4": ("validation", " ", 1100, 256),
    }
    assert (evaluator.length, evaluator.bos, evaluator.mode) == (2048, "as_tokenised", "joined")


def test_field_texts_that_are_not_there(tmp_path: Path) -> None:
    """Catches a stack trace, or another text, where neither network nor cache nor mirror has it."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", "evaluation=field")
    assert caught.value.key == "evaluation.field.texts.wikitext2.dataset"
    for word in (
        "Salesforce/wikitext",
        "HF_HUB_OFFLINE",
        "the cache of `datasets`",
        "texts.wikitext2.mirror",
    ):
        assert word in caught.value.screen()
    assert len(caught.value.screen().splitlines()) < 10
    with pytest.raises(ConfigError, match="no folder /no/such") as caught:
        _field("evaluation.field.texts.wikitext2.mirror=/no/such").cut(WITH_BOS, "evaluation.field")
    assert caught.value.key == "evaluation.field.texts.wikitext2.mirror"


def test_window_longer_than_the_context(tmp_path: Path) -> None:
    """Catches the field's window on a model that is too short for it."""
    mirrors = _mirrors(tmp_path / "mirrors")
    long = {"text": ["word " * 4000]}
    parquet.write_table(pyarrow.table(long), mirrors["wikitext2"] / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")  # fmt: skip
    gone = [f"~evaluation.field.texts.{name}" for name in ("ptb", "c4")]
    place = f"evaluation.field.texts.wikitext2.mirror={mirrors['wikitext2']}"
    with pytest.raises(ConfigError, match="longer than the model's context") as caught:
        plan_of(
            tmp_path / "out", "evaluation=field", *gone, place, "+model.config.max_position_embeddings=512"
        )
    assert caught.value.key == "evaluation.field.length"


def test_a_files_entry_can_join_otherwise(tmp_path: Path) -> None:
    """Catches texts of one's own that cannot be joined as the field does."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in PTB))
    entry = FieldText(
        dataset="own", config=None, data_split="train", revision="main", text_field="body", lines=False,
        joiner=" | ", num_rows=2, max_windows=None, mirror=str(folder),
    )  # fmt: skip
    [text] = Perplexity(texts={"own": entry}, length=8, bos="as_tokenised").cut(WITHOUT, "e").values()
    ids = WITHOUT(" | ".join(PTB[:2]))["input_ids"]
    assert text.tokens_NT.flatten().tolist() == ids[: len(ids) // 8 * 8]
    with pytest.raises(ConfigError, match="no such column"):
        replace(entry, text_field="bodi").read("k")
