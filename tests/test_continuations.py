"""What a model writes: numbers by hand and by brute force, batches, draws, summaries."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import MakeModel
from helpers import run_tiny, write_documents
from reprune.build import build
from reprune.errors import ConfigError, RunError
from reprune.evaluation import writing
from reprune.evaluation.continuations import FILE, Continuations
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.summaries import FILE as SUMMARIES
from reprune.evaluation.summaries import PROMPTS, SourceSet, Summaries
from reprune.evaluation.text_statistics import distinct, mean_over_prompts, overlap, perplexity, repetition
from reprune.evaluation.writing import Written, tokens_rouge_l, write
from reprune.model.likelihood import token_losses
from reprune.model.loading import LoadedModel
from reprune.model.tiny import byte_tokenizer
from reprune.seeding import generator

ROWS = st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=6)


def prompts_of(lengths: Sequence[int]) -> list[Tensor]:
    """Random prompts of these lengths, each beginning with BOS."""
    stream = generator(0, "prompts")
    return [
        torch.cat([torch.tensor([0]), torch.randint(2, 258, (n - 1,), generator=stream)]) for n in lengths
    ]


def evaluated(
    model: LoadedModel, evaluator: Any, folder: Path, dense: Path | None = None, key: str = "evaluation.it"
) -> Outcome:
    """What an evaluator finds of a model; its files lie in `folder`."""
    folder.mkdir()
    texts = evaluator.cut(model.tokenizer, key)
    outcome: Outcome = evaluator.evaluate(Task(model, texts, folder, dense, lambda done, total: None))
    return outcome


def continuations(path: Path, **choices: Any) -> Continuations:
    """Short continuations of a file's documents."""
    sizes = {"num_prompts": 5, "prompt_length": 9, "num_tokens": 14, "batch_size": 4}
    return Continuations(texts={"mine": str(path)}, **{**sizes, **choices})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A user's text of random words."""
    path = tmp_path / "mine.jsonl"
    write_documents(path, count=8)
    return path


@given(ROWS)
def test_repetition_is_that_of_brute_force(rows: list[list[int]]) -> None:
    """Catches n-grams over a row's end, the first occurrence counted as a repetition, rows without n-grams counted as 0."""
    shares = {}
    for number, row in enumerate(rows):
        grams = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
        if grams:
            shares[number] = sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams)
    found = repetition("r", rows, list(range(len(rows))))
    if not shares:
        assert found == {}
        return
    assert found["r"] == pytest.approx(np.mean(list(shares.values())), abs=1e-12)
    if len(shares) > 1:
        error = np.std(list(shares.values()), ddof=1) / math.sqrt(len(shares))
        assert found["r_stderr"] == pytest.approx(error, abs=1e-12)


@given(ROWS, st.sampled_from([1, 2, 3]), st.integers(1, 2))
def test_distinct_is_that_of_brute_force(rows: list[list[int]], size: int, a_prompt: int) -> None:
    """Catches distinct-n by row, and a jackknife that leaves out rows where prompts are the units."""
    prompts = [number // a_prompt for number in range(len(rows))]

    def share(kept: list[list[int]]) -> float | None:
        grams = [tuple(row[i : i + size]) for row in kept for i in range(len(row) - size + 1)]
        return len(set(grams)) / len(grams) if grams else None

    found = distinct("d", rows, prompts, size)
    if share(rows) is None:
        assert found == {}
        return
    assert found["d"] == pytest.approx(share(rows), abs=1e-12)
    units = sorted(set(prompts))
    without = [share([row for row, of in zip(rows, prompts, strict=True) if of != unit]) for unit in units]
    if len(units) > 1 and None not in without:
        values = np.array(without, float)
        error = math.sqrt((len(units) - 1) / len(units) * ((values - values.mean()) ** 2).sum())
        assert found["d_stderr"] == pytest.approx(error, abs=1e-12)
    else:
        assert "d_stderr" not in found


def test_means_and_perplexity_by_hand() -> None:
    """Catches rows as units of a standard error, and a perplexity that weights rows and not tokens."""
    found = mean_over_prompts("m", [1.0, 3.0, 6.0], [0, 0, 7])
    assert found == {"m": 4.0, "m_stderr": 2.0}, "prompt 0 has 2, prompt 7 has 6"
    assert mean_over_prompts("m", [5.0], [3]) == {"m": 5.0}
    assert mean_over_prompts("m", [], []) == {}
    found = perplexity("p", [math.log(2) * 3, math.log(8)], [3, 1], [0, 1])
    assert found["p"] == pytest.approx(2**1.5)
    # Residuals of loss on tokens: (3 − 4.5) and (3 − 1.5), in units of ln 2; 2 / 1 of their squares; 4 tokens.
    assert found["p_stderr"] == pytest.approx(2**1.5 * math.log(2) * math.sqrt(2 * (1.5**2 + 1.5**2)) / 4)


def test_overlap_by_hand() -> None:
    """Catches types for tokens, and n-grams looked for as words."""
    written, source = ["a", "b", "a", "c"], ["b", "a", "x", "a", "b"]
    assert overlap(written, source, 1) == 3 / 4
    assert overlap(written, source, 2) == 2 / 3, "ab, ba are there, ac is not"
    assert overlap(written, source, 3) == 0
    assert overlap(["a"], source, 2) is None


def test_rouge_l_of_tokens_by_hand() -> None:
    """Catches ids that lose digits or order on their way through a package made for words."""
    assert tokens_rouge_l([1, 22, 3], [1, 22, 3]) == 1
    assert tokens_rouge_l([1, 2, 3, 4], [2, 4, 9, 9]) == pytest.approx(0.5)
    assert tokens_rouge_l([12], [1, 2]) == 0
    assert tokens_rouge_l([], []) == 1
    assert tokens_rouge_l([], [5]) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "opt", "gemma3_text"])
def test_greedy_is_transformers_own_one_at_a_time(architecture: str, make_model: MakeModel) -> None:
    """Catches padding that is read, positions that count it, and a cache that mixes rows."""
    model = make_model(architecture)
    prompts = prompts_of([5, 11, 7, 3])
    found = write(model, prompts, 12, 3, [], "it")
    for prompt, one in zip(prompts, found, strict=True):
        alone = model.model.generate(prompt[None], do_sample=False, max_new_tokens=12, pad_token_id=1)
        written = alone[0, len(prompt) :].tolist()
        assert [*one.tokens, *([1] if one.ended else [])] == written
        whole = torch.cat([prompt, torch.tensor(written)])
        losses = token_losses(model, whole[None])[0, len(prompt) - 1 :]
        assert one.loss == pytest.approx(float(losses.double().sum()), rel=1e-4)


def test_a_checkpoints_own_settings_do_not_count(make_model: MakeModel) -> None:
    """Catches a repetition penalty of the checkpoint's that hides how much a pruned model repeats itself."""
    model = make_model()
    prompts = prompts_of([6, 6])
    plain = write(model, prompts, 16, 2, [], "it")
    model.model.generation_config.repetition_penalty = 50.0
    model.model.generation_config.no_repeat_ngram_size = 1
    model.model.generation_config.suppress_tokens = plain[0].tokens
    kept = model.model.generation_config
    assert write(model, prompts, 16, 2, [], "it") == plain
    assert model.model.generation_config is kept


def test_writing_ends_with_the_end_of_text_token(make_model: MakeModel) -> None:
    """Catches text behind the end, an end-of-text token that counts as text, and a loss without it."""
    model = make_model()
    prompts = prompts_of([6, 8])
    free = write(model, prompts, 10, 2, [], "it")
    end = free[0].tokens[3]
    first = free[0].tokens.index(end)
    model.tokenizer = byte_tokenizer(True)
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)
    stopped = write(model, prompts, 10, 2, [], "it")
    assert stopped[0].tokens == free[0].tokens[:first]
    assert (stopped[0].ended, stopped[0].num_choices) == (True, first + 1)
    whole = torch.cat([prompts[0], torch.tensor(free[0].tokens[: first + 1])])
    expected = token_losses(model, whole[None])[0, 5:].double().sum()
    assert stopped[0].loss == pytest.approx(float(expected), rel=1e-4)
    assert free[1].num_choices == len(free[1].tokens) + free[1].ended


def test_draws_follow_the_models_distribution(make_model: MakeModel) -> None:
    """Catches a temperature that is ignored, and a loss at the temperature and not of the model itself."""
    model = make_model()
    prompt = prompts_of([6])[0]
    logits = model.logits(prompt[None])[0, -1].double()
    for temperature in (0.5, 2.0):
        found = write(
            model, [prompt] * 600, 1, 200, [], "it", temperature=temperature,
            stream_of=lambda place: generator(0, "draws", place),
        )  # fmt: skip
        odds = torch.softmax(logits / temperature, -1)
        likeliest = int(odds.argmax())
        share = sum(one.tokens == [likeliest] for one in found) / 600
        wanted = float(odds[likeliest])
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 600)
        one = next(one for one in found if one.tokens)
        own = torch.log_softmax(logits, -1)[one.tokens[0]]
        assert one.loss == pytest.approx(-float(own), rel=1e-4)


def test_batches_change_nothing(tmp_path: Path, text: Path, make_model: MakeModel) -> None:
    """Catches streams shared by a batch, and rows told apart by their place in it."""
    model = make_model()
    frames = []
    for size in (1, 3, 5):
        evaluated(model, continuations(text, batch_size=size, num_samples=2), tmp_path / str(size))
        frames.append(pd.read_parquet(tmp_path / str(size) / FILE))
    for frame in frames[1:]:
        assert [list(row) for row in frame["tokens"]] == [list(row) for row in frames[0]["tokens"]]
        assert frame["loss"].to_numpy() == pytest.approx(frames[0]["loss"].to_numpy(), rel=1e-4)
    sampled = frames[0][frames[0]["mode"] == "sampled"]
    drawn = {tuple(row) for row in sampled["tokens"]}
    assert len(drawn) == len(sampled) == 10, "no two prompts or samples share a stream"


def test_draws_are_reproducible(tmp_path: Path, text: Path, make_model: MakeModel) -> None:
    """Catches draws from a global stream, fewer prompts that change the others' draws, and a seed that is not used."""
    model = make_model()
    torch.manual_seed(1)
    evaluated(model, continuations(text), tmp_path / "first")
    torch.manual_seed(2)
    evaluated(model, continuations(text, num_prompts=2), tmp_path / "second")
    evaluated(model, continuations(text, seed=1), tmp_path / "third")
    first, second, third = (
        pd.read_parquet(tmp_path / name / FILE).query("mode == 'sampled'")["tokens"].map(tuple).tolist()
        for name in ("first", "second", "third")
    )
    assert second == first[:2]
    assert third != first


def test_metrics_are_those_of_the_rows(tmp_path: Path, text: Path, make_model: MakeModel) -> None:
    """Catches metrics that are not of the continuations kept, and prompts that are not the documents' beginnings."""
    model = make_model()
    outcome = evaluated(model, continuations(text), tmp_path / "alone")
    frame = pd.read_parquet(tmp_path / "alone" / FILE)
    names = {"repetition", "distinct_1", "distinct_2", "distinct_3", "self_perplexity", "length", "ended"}
    wanted = {f"generation/mine/{mode}/{name}" for mode in ("greedy", "sampled") for name in names}
    assert {name for name in outcome.metrics if not name.endswith("_stderr")} == wanted
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert all(
        row.prompt_text == f"<bos>{documents[row.prompt][:8]}" for row in frame.itertuples(index=False)
    )
    greedy = frame[frame["mode"] == "greedy"]
    tokens = sum(len(row) + ended for row, ended in zip(greedy["tokens"], greedy["ended"], strict=True))
    expected = math.exp(greedy["loss"].sum() / tokens)
    assert outcome.metrics["generation/mine/greedy/self_perplexity"] == pytest.approx(expected)
    assert outcome.metrics["generation/mine/greedy/length"] == greedy["tokens"].map(len).mean()


def test_beside_the_dense_model(tmp_path: Path, text: Path, make_model: MakeModel) -> None:
    """Catches continuations compared with those of other prompts or modes."""
    model = make_model()
    evaluated(model, continuations(text), tmp_path / "dense")
    same = evaluated(model, continuations(text), tmp_path / "same", tmp_path / "dense")
    for mode in ("greedy", "sampled"):
        assert same.metrics[f"generation/mine/{mode}/rouge_l_dense"] == 1
    with torch.no_grad():
        model.blocks[0].mlp.down_proj.weight.mul_(-3)
    other = evaluated(model, continuations(text), tmp_path / "other", tmp_path / "dense")
    frames = [
        pd.read_parquet(tmp_path / name / FILE).query("mode == 'greedy'") for name in ("other", "dense")
    ]
    scores = [
        tokens_rouge_l(list(one), list(dense))
        for one, dense in zip(*(frame["tokens"] for frame in frames), strict=True)
    ]
    found = other.metrics["generation/mine/greedy/rouge_l_dense"]
    assert found == pytest.approx(np.mean(scores))
    assert found < 1


def test_memory_that_runs_out_halves_the_batch(
    tmp_path: Path, text: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches prompts written twice or left out after a batch that did not fit, and a silent halving."""
    model = make_model()
    plain = evaluated(model, continuations(text), tmp_path / "plain")
    whole, sizes = writing._batch, []

    def small(model: LoadedModel, prompts: Sequence[Tensor], *rest: Any) -> list[Written]:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return whole(model, prompts, *rest)

    monkeypatch.setattr(writing, "_batch", small)
    halved = evaluated(model, continuations(text), tmp_path / "halved")
    assert sizes[:4] == [4, 2, 2, 1]
    assert halved.metrics == pytest.approx(plain.metrics, rel=1e-4)
    assert (
        halved.notes
        == ["generation on 'mine': the device is out of memory with 4 rows at once, going on with 2"] * 2
    )

    def full(*_: Any) -> list[Written]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(writing, "_batch", full)
    with pytest.raises(RunError, match="with a single row"):
        evaluated(model, continuations(text), tmp_path / "full")


def test_a_text_that_fails_leaves_the_others(tmp_path: Path, text: Path, make_model: MakeModel) -> None:
    """Catches one text's failure that takes the others along, and numbers for what failed."""
    model = make_model()
    other = tmp_path / "other.jsonl"
    write_documents(other, count=8, seed=1)
    evaluator = Continuations(
        texts={"mine": str(text), "bad": str(other)}, num_prompts=2, prompt_length=9, num_tokens=4
    )
    whole, calls = model.model.forward, []

    def broken(*given: Any, **more: Any) -> Any:
        calls.append(1)
        output = whole(*given, **more)
        if len(calls) > 8:
            output.logits.fill_(torch.nan)
        return output

    model.model.forward = broken
    outcome = evaluated(model, evaluator, tmp_path / "out")
    assert outcome.failed.keys() == {"generation/bad"}
    assert "not finite" in outcome.failed["generation/bad"]
    assert {name.split("/")[1] for name in outcome.metrics} == {"mine"}


@pytest.mark.parametrize(
    ("choices", "key", "words"),
    [
        ({"num_prompts": 9}, "evaluation.it.texts.mine", "8 documents of this text are longer than 9"),
        ({"prompt_length": 5000}, "evaluation.it.texts.mine", "0 documents of this text"),
        ({"prompt_length": 1}, "prompt_length", "too short"),
        ({"num_tokens": 0}, "num_tokens", "greater than zero"),
        ({"temperature": 0.0}, "temperature", "greater than zero"),
        ({"num_samples": -1}, "num_samples", "negative"),
    ],
)
def test_bad_choices_are_told(text: Path, choices: dict[str, Any], key: str, words: str) -> None:
    """Catches choices that would only be found out while writing."""
    with pytest.raises(ConfigError, match=words) as raised:
        continuations(text, **choices).cut(byte_tokenizer(True), "evaluation.it")
    assert raised.value.key == key


def test_room_is_told(text: Path) -> None:
    """Catches a continuation that runs out of the model's context."""
    continuations(text).check_room(22, "evaluation.it")
    with pytest.raises(ConfigError, match="at most 13 behind 9 tokens"):
        continuations(text).check_room(21, "evaluation.it")


ARTICLES = [
    {"document": "The cat sat on the mat. It was warm there, and the dog lay beside it.", "summary": "A cat sat."},
    {"document": "Rain fell on the hills for nine days, and the river rose over its banks.", "summary": "It rained."},
    {"document": "A short one.", "summary": "Short."},
]  # fmt: skip


def summaries(folder: Path, articles: list[dict[str, Any]] = ARTICLES, **choices: Any) -> Summaries:
    """Short summaries of a file of articles."""
    path = folder / "articles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in articles))
    sizes = {"num_documents": None, "length": 160, "num_tokens": 10, "batch_size": 2}
    prompts = {"first": "Say it shortly:\n{document}\nThe summary is:", "second": "{document}\nShort:"}
    return Summaries(**{"path": str(path), "prompts": prompts, **sizes, **choices})


def test_summaries_scored_by_hand(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches scores against the source where the reference is meant, and the other way round; means over prompts as units."""
    model = make_model()
    said = {"first": "the cat sat on a chair", "second": "the cat sat"}

    def speak(model: LoadedModel, prompts: list[Tensor], *_: Any, **__: Any) -> list[Written]:
        first = "Say it" in model.tokenizer.decode(prompts[0])
        ids = model.tokenizer(said["first" if first else "second"], add_special_tokens=False)["input_ids"]
        return [Written(ids, True, 1.0) for _ in prompts]

    monkeypatch.setattr("reprune.evaluation.summaries.write", speak)
    articles = [
        {"document": "on the mat the cat sat", "summary": "a cat sat on a mat"},
        {"document": "dogs", "summary": "the cats sat"},
    ]
    outcome = evaluated(model, summaries(tmp_path, articles), tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out" / SUMMARIES)
    one = frame.iloc[0]
    # the cat sat on a chair | a cat sat on a mat: 4 of 6 words, cat-sat sat-on on-a of 5 pairs, "cat sat on a".
    assert (one["rouge_1"], one["rouge_2"], one["rouge_l"]) == pytest.approx((4 / 6, 3 / 5, 4 / 6))
    # Source words on the mat cat sat: 4 of 6; pairs the-cat cat-sat of 5; the-cat-sat of 4.
    assert (one["overlap_1"], one["overlap_2"], one["overlap_3"]) == pytest.approx((4 / 6, 2 / 5, 1 / 4))
    # Stemmed, 'the cats sat' is 'the cat sat'.
    assert frame.iloc[3]["rouge_l"] == 1
    first = frame[frame["prompt"] == "first"]["rouge_l"]
    assert outcome.metrics["summaries/first/rouge_l"] == pytest.approx(first.mean())
    by_document = frame.groupby("document")["rouge_l"].mean()
    assert outcome.metrics["summaries/all/rouge_l"] == pytest.approx(by_document.mean())
    error = by_document.std(ddof=1) / math.sqrt(2)
    assert outcome.metrics["summaries/all/rouge_l_stderr"] == pytest.approx(error)
    assert outcome.metrics["summaries/all/ended"] == 1


def test_long_documents_are_cut_from_their_end(tmp_path: Path, make_model: MakeModel) -> None:
    """Catches documents cut in front, more than is needed, without a word, and prompts that outgrow their room."""
    model = make_model()
    long = "".join(chr(97 + i % 26) + "é" * (i % 3 == 0) for i in range(300))
    articles = [*ARTICLES, {"document": long, "summary": "Letters."}]
    evaluator = summaries(tmp_path, articles)
    [text] = evaluator.cut(model.tokenizer, "evaluation.it").values()
    assert isinstance(text, SourceSet)
    assert text.sources[:3] == tuple(row["document"] for row in ARTICLES)
    assert long.startswith(text.sources[3])
    assert text.num_cut == 1
    lengths = [
        len(evaluator._ids(prompt, text.sources[3], model.tokenizer)) for prompt in evaluator.prompts.values()
    ]
    # A character more has at most two bytes.
    assert 148 <= max(lengths) <= 150
    outcome = evaluated(model, evaluator, tmp_path / "out")
    assert outcome.notes == ["summaries: 1 of 4 documents were cut to fit"]
    for row, source in zip(text.tokens_NT, text.sources, strict=True):
        ids = model.tokenizer(source, add_special_tokens=False)["input_ids"]
        assert row.tolist() == (ids * 20)[: len(row)]


def test_summaries_beside_the_dense_model(tmp_path: Path, make_model: MakeModel) -> None:
    """Catches summaries that depend on the batch, or are compared with those of other documents."""
    model = make_model()
    alone = evaluated(model, summaries(tmp_path), tmp_path / "dense")
    same = evaluated(model, summaries(tmp_path, batch_size=1), tmp_path / "same", tmp_path / "dense")
    assert {name: same.metrics[name] for name in alone.metrics} == pytest.approx(alone.metrics)
    assert same.metrics["summaries/all/rouge_l_dense"] == 1
    assert not any("rouge_l_dense" in name for name in alone.metrics)


@pytest.mark.parametrize(
    ("articles", "choices", "key", "words"),
    [
        (ARTICLES, {"path": "nowhere.jsonl"}, "evaluation.it.path", "no such file"),
        (ARTICLES, {"path": __file__}, "evaluation.it.path", "no rows"),
        (ARTICLES, {"reference_field": "sumary"}, "evaluation.it.path", "did you mean 'summary'"),
        (ARTICLES, {"num_documents": 4}, "evaluation.it.num_documents", "3 documents with a summary"),
        (ARTICLES, {"length": 30}, "evaluation.it.length", "no room"),
        (ARTICLES, {"prompts": {"bad": "No place"}}, "prompts.bad", "not a prompt"),
        (ARTICLES, {"prompts": {"all": "{document}"}}, "prompts.all", "not a prompt"),
        ([{"document": "x", "summary": " "}], {}, "evaluation.it.num_documents", "0 documents"),
    ],
)
def test_bad_files_are_told(
    tmp_path: Path, articles: list[dict[str, Any]], choices: dict[str, Any], key: str, words: str
) -> None:
    """Catches files that would fail, or be misread, only once the model is loaded."""
    with pytest.raises(ConfigError, match=words) as raised:
        summaries(tmp_path, articles, **choices).cut(byte_tokenizer(True), "evaluation.it")
    assert raised.value.key == key


def test_parquet_with_holes_is_refused(tmp_path: Path) -> None:
    """Catches references that move up to other documents where a column has holes."""
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"document": ["a", None, "c"], "summary": [None, "b", "c"]}).to_parquet(path)
    with pytest.raises(ConfigError, match="some rows have no document"):
        Summaries(path=str(path)).cut(byte_tokenizer(True), "evaluation.it")


def test_the_papers_prompts_are_the_presets() -> None:
    """Catches a YAML whose prompts drift from those of the class."""
    import yaml

    from support import CONF

    node = yaml.safe_load((CONF / "evaluation" / "summarisation.yaml").read_text())["summaries"]
    assert node["prompts"] == PROMPTS
    with pytest.raises(ConfigError, match="has to be set"):
        build(node, "evaluation.summaries")


def test_summaries_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches documents that a run cannot hold against its calibration text, and ones that are in both."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    documents = write_documents(tmp_path / "texts.jsonl", words=30)
    articles = [{"document": text, "summary": text[:20]} for text in documents[:30]]
    summaries(tmp_path, articles)
    sizes = {"num_documents": 30, "length": 400, "num_tokens": 4, "batch_size": 8}
    asked = [f"evaluation.summaries.{key}={value}" for key, value in sizes.items()]
    asked += ["evaluation=summarisation", f"evaluation.summaries.path={tmp_path / 'articles.jsonl'}"]
    _, result = run_tiny(tmp_path / "out", *asked)
    assert 0 <= result["metrics"]["eval/pruned/summaries/all/rouge_l_dense"] <= 1
    assert result["overlap"]["evaluation.summaries.documents"] == 0
    use = ["calibration=domain", "calibration.num_sequences=3", "calibration.length=16"]
    with pytest.raises(ConfigError, match="is also used as calibration text"):
        run_tiny(tmp_path / "both", *asked, *use, f"calibration.domain={tmp_path / 'texts.jsonl'}")
