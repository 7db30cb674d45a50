"""Text the model writes itself: the recipes against plain loops, ends, seeds, the cache, and models that write nothing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import plan_of, write_documents
from reprune.build import build
from reprune.calibration.continued import Continued
from reprune.calibration.corpora import Domain, Web
from reprune.calibration.generated import Generated, known_languages
from reprune.calibration.generation import MAX_UNWRITTEN, WrittenText, draw, sample
from reprune.calibration.mixture import Mixture
from reprune.calibration.same import Same
from reprune.calibration.self_calibration import STOP_WORDS, SelfCalibration, stop_word_tokens
from reprune.calibration.source import TextContext, TextSet
from reprune.calibration.splits import documents_of
from reprune.calibration.vocabulary import Vocabulary
from reprune.calibration.windows import cut_windows
from reprune.compose import compose_run
from reprune.errors import ConfigError, RunError
from reprune.model.description import load_tokenizer
from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel, load_model
from reprune.model.tiny import TinyModel
from reprune.seeding import generator

LENGTH = 12
NEW = 16
KINDS = ("study", "self_calibration", "stop_words", "continued", "hidden_prefix")


@pytest.fixture
def generated_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; returns where generated text goes."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "generated"


@pytest.fixture
def tiny(generated_cache: Path) -> LoadedModel:
    """A random model of 3 blocks over bytes."""
    return _tiny()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 40 random documents of about 400 bytes."""
    path = tmp_path_factory.mktemp("text") / "mine.jsonl"
    write_documents(path)
    return path


def _tiny(*, add_bos: bool = True, seed: int = 0) -> LoadedModel:
    source = TinyModel(weights_seed=seed, add_bos=add_bos)
    model = load_model(source, load_tokenizer(source), plan_device("cpu", "float32", None, 1))
    # Far from uniform, so that what a text holds decides what comes next.
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(40)
    return model


def _always_ends(model: LoadedModel) -> LoadedModel:
    """The same model, which says end-of-text whatever it reads."""

    def ended(module: Any, inputs: Any, output: Any) -> Any:
        output.logits.fill_(-1000.0)[..., model.tokenizer.eos_token_id] = 1000.0
        return output

    model.model.register_forward_hook(ended)
    return model


def _source(kind: str, documents: Path, **more: Any) -> WrittenText:
    sizes = {"num_sequences": 4, "length": LENGTH, "max_new_tokens": NEW, "batch_size": 2, **more}
    if kind == "study":
        return Generated(**{"language": None, "num_greedy": 2, **sizes})
    if kind in ("self_calibration", "stop_words"):
        first: Any = "bos" if kind == "self_calibration" else "stop_words"
        return SelfCalibration(first_token=first, t_init=2.0, t_fin=0.5, n=4, cross_documents=True, **sizes)
    keep = kind == "continued"
    return Continued(prefixes=Domain(domain=str(documents)), prefix_tokens=5, keep_prefix=keep, **sizes)


def _cut(source: WrittenText, model: LoadedModel, seed: int = 0, role: Any = "calibration") -> TextSet:
    return cut_windows(
        source, role=role, tokenizer=model.tokenizer, model=model, seed=seed, key="calibration"
    )


def _context(model: LoadedModel, part: Any = "calibration", seed: int = 0) -> TextContext:
    return TextContext(model.tokenizer, model, part, LENGTH, generator(0, "unused"), seed, "calibration")


def _texts(source: WrittenText, model: LoadedModel, count: int, **more: Any) -> list[Any]:
    return list(itertools.islice(source.documents(_context(model, **more)), count))


@torch.no_grad()
def _continue(
    model: LoadedModel, start: Sequence[int], stream: Any, temperatures: Sequence[float]
) -> list[int]:
    """What one text goes on with, every token from the whole text so far and without a cache."""
    ids, end = list(start), model.tokenizer.eos_token_id
    for temperature in temperatures:
        logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        token = int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=stream))
        if token == end:
            break
        ids.append(token)
    return ids[len(start) :]


def _ramp(source: SelfCalibration, count: int) -> list[float]:
    """The paper's formula as it stands there."""
    return [
        source.t_init + (i / source.n) * (source.t_fin - source.t_init) if i <= source.n else source.t_fin
        for i in range(count)
    ]


def _by_hand(source: WrittenText, model: LoadedModel, documents: Path, place: int) -> list[int]:
    """The text at `place` as its recipe says, one at a time."""
    tokenizer = model.tokenizer
    stream = generator(0, source.name, "calibration", place)
    bos = tokenizer.bos_token_id
    if isinstance(source, Generated):
        ordinary = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
        while True:
            start = [bos, ordinary[int(torch.randint(len(ordinary), (1,), generator=stream))]]
            for _ in range(source.num_greedy):
                start.append(int(model.logits(torch.tensor([start]))[0, -1].argmax()))
            if tokenizer.eos_token_id not in start:
                break
        return start[1:] + _continue(model, start, stream, [source.temperature] * NEW)
    if isinstance(source, SelfCalibration):
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "i")]
        start = [bos]
        if source.first_token == "stop_words":
            start += words[int(torch.randint(len(words), (1,), generator=stream))]
        return start[1:] + _continue(model, start, stream, _ramp(source, NEW))
    assert isinstance(source, Continued)
    parts = documents_of(source.prefixes.corpus("c"), "calibration", tokenizer, "c")
    order = torch.randperm(
        len(parts), generator=generator(0, "continued", "calibration", "prefixes")
    ).tolist()
    start = tokenizer(parts[order[place]].text, add_special_tokens=False)["input_ids"][: source.prefix_tokens]
    more = _continue(model, [bos, *start], stream, [source.temperature] * NEW)
    return start + more if source.keep_prefix else more


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_recipe_against_one_text_at_a_time(
    kind: str, batch_size: int, tiny: LoadedModel, documents: Path
) -> None:
    """Catches rows of a batch that read each other or a wrong position, and a cache that forgets."""
    source = _source(kind, documents, batch_size=batch_size)
    for place, text in enumerate(_texts(source, tiny, 8)):
        assert text.tokens.tolist() == _by_hand(source, tiny, documents, place), place


def test_sampling_near_temperature_zero_is_greedy(tiny: LoadedModel) -> None:
    """Catches a temperature that does not reach the logits."""
    starts = torch.arange(10, 22).reshape(4, 3)
    streams = [generator(0, "test", place) for place in range(4)]
    written = sample(tiny, starts, streams, lambda place: 1e-4, 10)
    for start, text in zip(starts.tolist(), written, strict=True):
        ids = list(start)
        for token in text:
            assert token == int(tiny.logits(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)


def test_draws_are_those_of_multinomial() -> None:
    """Catches a faster draw that is another one: texts that were generated before would change."""
    odds = torch.softmax(3 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)), dim=-1)
    ours, theirs = ([torch.Generator().manual_seed(i) for i in range(6)] for _ in range(2))
    for _ in range(20):
        expected = [int(torch.multinomial(row, 1, generator=s)) for row, s in zip(odds, theirs, strict=True)]
        assert draw(odds, ours) == expected


def test_draws_from_nothing_are_refused() -> None:
    """Catches token 0 for logits that overflowed."""
    with pytest.raises(RunError, match="not finite"):
        draw(torch.full((2, 5), torch.nan), [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize(
    ("t_init", "t_fin", "n"), [(2.0, 0.5, 4), (0.5, 1.5, 10), (1.0, 1.0, 10), (3.0, 1.0, 0)]
)
def test_temperature_ramp(t_init: float, t_fin: float, n: int) -> None:
    """Catches a ramp that is a token off, or that goes on behind n."""
    source = SelfCalibration(t_init=t_init, t_fin=t_fin, n=n)
    found = [source.temperature_of(i) for i in range(15)]
    assert found == pytest.approx(_ramp(source, 15) if n else [t_fin] * 15)
    assert found[n:] == [t_fin] * (15 - n)
    if n:
        assert found[0] == t_init


def test_stop_words_come_first(tiny: LoadedModel, documents: Path) -> None:
    """Catches first tokens that are no stop words, or always the same one."""
    texts = _texts(_source("stop_words", documents), tiny, 30)
    words = {tiny.tokenizer.decode(text.tokens[:1]) for text in texts}
    assert words == {"a", "i"}
    assert set(STOP_WORDS) >= words
    assert len(stop_word_tokens(tiny.tokenizer)) == 2
    assert len(set(STOP_WORDS)) == len(STOP_WORDS)


def test_texts_that_end_early_are_joined(tiny: LoadedModel, documents: Path) -> None:
    """Catches tokens lost where one text ends and the next begins, and texts of nothing."""
    end = tiny.tokenizer.eos_token_id

    def ends_now_and_then(module: Any, inputs: Any, output: Any) -> Any:
        output.logits[..., end] = output.logits.logsumexp(dim=-1) - 2
        return output

    tiny.model.register_forward_hook(ends_now_and_then)
    source = _source("self_calibration", documents, num_sequences=10)
    rows = _cut(source, tiny).tokens_NT
    assert (rows[:, 0] == tiny.tokenizer.bos_token_id).all()
    texts = [text.tokens.tolist() for text in _texts(source, tiny, 100)]
    assert all(texts)
    assert any(len(text) < NEW for text in texts), "no text ended early, so nothing is tested"
    assert all(end not in text and len(text) <= NEW for text in texts)
    joined = list(itertools.chain.from_iterable([*text, end] for text in texts))
    body = rows[:, 1:].reshape(-1).tolist()
    assert body == joined[: len(body)]


def test_continued_text_begins_with_its_part(tiny: LoadedModel, documents: Path) -> None:
    """Catches a held-out document behind calibration text."""
    source = _source("continued", documents)
    assert isinstance(source, Continued)
    corpus = source.prefixes.corpus("calibration")
    for part in ("calibration", "probe", "validation"):
        own = {
            document.id: document.text or "" for document in documents_of(corpus, part, tiny.tokenizer, "c")
        }
        for text in _texts(source, tiny, len(own), part=part):
            assert own[text.id].startswith(tiny.tokenizer.decode(text.tokens[: source.prefix_tokens]))


def test_every_document_is_continued_before_one_is_again(tiny: LoadedModel, documents: Path) -> None:
    """Catches one document's beginning in every window, and a prefix that is used twice while others wait."""
    source = _source("continued", documents)
    assert isinstance(source, Continued)
    corpus = source.prefixes.corpus("calibration")
    count = len(documents_of(corpus, "calibration", tiny.tokenizer, "c"))
    prefixes = source.listed(_context(tiny))
    assert len({name for name, _ in prefixes[:count]}) == count
    assert len({(name, *ids.tolist()) for name, ids in prefixes}) == len(prefixes) > 10 * count
    other = source.listed(_context(tiny, seed=1))
    assert [name for name, _ in other] != [name for name, _ in prefixes]


def test_texts_go_on_when_every_prefix_was_used(tiny: LoadedModel, tmp_path: Path) -> None:
    """Catches a small text that runs out of prefixes, and the same draws the second time round."""
    path = tmp_path / "small.jsonl"
    write_documents(path, count=12, words=2)
    source = replace(_source("continued", path), prefix_tokens=10)
    assert isinstance(source, Continued)
    there = len(source.listed(_context(tiny)))
    texts = _texts(source, tiny, 2 * there)
    assert [text.id for text in texts[:there]] == [text.id for text in texts[there:]]
    assert all(
        one.tokens.tolist() != two.tokens.tolist()
        for one, two in zip(texts[:there], texts[there:], strict=True)
    )


def test_prefix_of_a_held_out_document_is_refused(tmp_path: Path, documents: Path) -> None:
    """Catches a probe's documents continued for calibration: what they hold would be known."""
    overrides = [
        "calibration=continued", "calibration.split=probe",
        f"calibration.prefixes.domain={documents}", "calibration.prefix_tokens=4", "calibration.max_new_tokens=20",
        "+calibration@probes.mine=domain", f"probes.mine.domain={documents}", "probes.mine.length=100",
        "probes.mine.num_sequences=8",
    ]  # fmt: skip
    plan = plan_of(tmp_path, *overrides)
    model = load_model(plan.source, plan.tokenizer, plan.device)
    with pytest.raises(ConfigError, match="is also used as"):
        plan.texts(model)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_set_and_part_decide(
    kind: str, tiny: LoadedModel, documents: Path, generated_cache: Path
) -> None:
    """Catches text that depends on global state or on what was written before, and draws that are not its own."""
    source = _source(kind, documents)
    first = _cut(source, tiny)
    others = [
        _cut(replace(source, set=1), tiny),
        _cut(source, tiny, role="probe"),
        _cut(source, tiny, seed=1),
        _cut(replace(source, batch_size=3, max_new_tokens=9), tiny),
    ]
    assert len({text.key for text in [first, *others]}) == 5
    shutil.rmtree(generated_cache)
    torch.manual_seed(1234)
    backwards = [_cut(source, tiny, seed=1), _cut(replace(source, set=1), tiny), _cut(source, tiny)]
    assert [text.key for text in backwards] == [others[2].key, others[0].key, first.key]
    more = _cut(replace(source, num_sequences=7), tiny)
    assert torch.equal(more.tokens_NT[:4], first.tokens_NT)


@pytest.mark.parametrize("cut", ["crop", "pack", "first"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_gives_windows(kind: str, cut: Any, tiny: LoadedModel, documents: Path) -> None:
    """Catches a recipe that works with one way of cutting only."""
    source = _source(kind, documents, cut=cut)
    source.check("calibration")
    made = _cut(source, tiny)
    assert made.tokens_NT.shape == (4, LENGTH)
    assert made.tokens_NT.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_second_time_comes_from_the_cache(
    kind: str, tiny: LoadedModel, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches text that is written again for every run, and ids that the cache forgets."""
    source = _source(kind, documents)
    first = _cut(source, tiny)

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("the model was called")

    monkeypatch.setattr(tiny.model, "forward", refuse)
    again = _cut(source, tiny)
    assert again.key == first.key
    assert again.document_ids == first.document_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_interrupted_generation_goes_on(
    kind: str,
    fault: type[BaseException],
    tiny: LoadedModel,
    documents: Path,
    generated_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches batches that are written again, and a half batch that is read as a whole one."""
    source = _source(kind, documents, num_sequences=16)
    whole = _cut(source, tiny)
    batches = len(_entries(generated_cache))
    assert batches > 2
    shutil.rmtree(generated_cache)
    calls: list[int] = []
    working = type(source).starts

    def breaks(self: Any, model: Any, context: Any, streams: Any, first: int) -> Any:
        calls.append(first)
        if len(calls) == 3:
            raise fault
        return working(self, model, context, streams, first)

    monkeypatch.setattr(type(source), "starts", breaks)
    with pytest.raises(fault):
        _cut(source, tiny)
    assert len(_entries(generated_cache)) == 2
    assert _cut(source, tiny).key == whole.key
    assert calls == [0, 2, 4, *range(4, 2 * batches, 2)], "the first two batches were written again"


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.is_dir()]


@pytest.mark.parametrize("cut", ["crop", "pack"])
@pytest.mark.parametrize("kind", [*KINDS, "no_greedy"])
def test_model_that_only_ends_is_refused(
    kind: str, cut: Any, tiny: LoadedModel, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that waits for text for ever, and windows of end-of-text tokens."""
    model = _always_ends(tiny)
    more = {"cut": cut, "batch_size": 64, "num_sequences": 1}
    source = _source("study", documents, num_greedy=0, **more) if kind == "no_greedy" else _source(kind, documents, **more)  # fmt: skip
    with pytest.raises(RunError, match=r"tiny.*ended"):
        _cut(source, model)
    assert MAX_UNWRITTEN <= 1000


def test_unwritten_texts_among_others_stay(tiny: LoadedModel) -> None:
    """Catches beginnings lost because the model ended them at once: they are texts of the study's recipe."""
    tokens = [torch.tensor(ids) for ids in ([5], [6, 7], [8], [9], [10, 11, 12])]

    class Given(Generated):
        def _batch(self, model: Any, context: Any, batch: int) -> list[tuple[str, Tensor]]:
            return [("", ids) for ids in tokens]

    source = Given(language=None, num_greedy=0)
    assert [text.tokens.tolist() for text in _texts(source, tiny, 5)] == [ids.tolist() for ids in tokens]


def test_no_bos_is_refused(documents: Path, generated_cache: Path) -> None:
    """Catches a text that begins with None where the recipe needs a BOS token."""
    model = _tiny(add_bos=False)
    model.tokenizer.bos_token = None
    with pytest.raises(ConfigError, match=r"calibration\.first_token: the tokenizer has no BOS token"):
        _cut(_source("self_calibration", documents), model)
    for kind in set(KINDS) - {"self_calibration"}:
        assert _cut(_source(kind, documents), model).tokens_NT.shape == (4, LENGTH)


def test_no_stop_word_is_refused(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, documents: Path) -> None:
    """Catches a draw from no words at all."""
    monkeypatch.setattr("reprune.calibration.self_calibration.STOP_WORDS", ("about", "above"))
    with pytest.raises(ConfigError, match=r"calibration\.first_token: no English stop word is one token"):
        _cut(_source("stop_words", documents), tiny)


def test_bos_that_no_text_gets_is_where_generation_starts(documents: Path, generated_cache: Path) -> None:
    """Catches a tokenizer that has BOS but does not add it: the recipe begins with BOS, the text does not hold it."""
    model = _tiny(add_bos=False)
    source = _source("self_calibration", documents)
    [text] = _texts(source, model, 1)
    assert text.tokens.tolist() == _by_hand(source, model, documents, 0)
    assert _cut(source, model).bos == "as_tokenised"


@pytest.mark.parametrize("language", ["eng", "english", "xx", ""])
def test_unknown_language_is_refused_before_loading(language: str, tmp_path: Path) -> None:
    """Catches 200 rounds of prefixes that no detector can call 'english'."""
    with pytest.raises(ConfigError, match=r"calibration\.language.*no such language"):
        plan_of(tmp_path, "calibration=generated", f"calibration.language='{language}'")


def test_known_languages() -> None:
    """Catches codes that are not the detector's."""
    known = known_languages()
    assert {"en", "de", "fr", "zh"} <= set(known)
    assert len(known) > 50


@pytest.mark.parametrize("option", ["generated", "self_calibration", "continued"])
def test_windows_longer_than_any_text_are_refused_before_loading(option: str, tmp_path: Path) -> None:
    """Catches hours of texts of which none is long enough."""
    with pytest.raises(ConfigError, match=r"calibration\.max_new_tokens: no text is longer than"):
        plan_of(
            tmp_path, f"calibration={option}", "calibration.cut=crop", "calibration.length=64",
            "calibration.max_new_tokens=40",
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_text_longer_than_the_context_is_refused(kind: str, tiny: LoadedModel, documents: Path) -> None:
    """Catches positions that the model does not have."""
    with pytest.raises(ConfigError, match=r"calibration\.max_new_tokens: longer than the model's context"):
        _cut(_source(kind, documents, max_new_tokens=513), tiny)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prefixes": Vocabulary()}, "prefixes: beginnings come from real documents"),
        ({"prefixes": "web"}, "prefixes: beginnings"),
        ({"prefixes": Web(split="probe")}, r"prefixes\.split: has no effect"),
        ({"prefixes": Web(num_sequences=3)}, r"prefixes\.num_sequences: has no effect"),
        ({"prefixes": Web(), "prefix_tokens": 0}, "prefix_tokens: must be greater"),
        ({"prefixes": Web(), "temperature": 0.0}, "temperature: must be greater"),
        ({"prefixes": Web(), "batch_size": 0}, "batch_size: must be greater"),
    ],
)
def test_wrong_continued(arguments: dict[str, Any], words: str) -> None:
    """Catches choices that mean nothing or that would do nothing."""
    with pytest.raises(ConfigError, match=words):
        Continued(**arguments)


@pytest.mark.parametrize("wrong", [{"t_init": 0.0}, {"t_fin": -1.0}, {"n": -1}, {"max_new_tokens": 0}])
def test_wrong_self_calibration(wrong: dict[str, Any]) -> None:
    """Catches temperatures that divide by zero."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SelfCalibration(**wrong)


def test_prefixes_longer_than_every_document(tiny: LoadedModel, documents: Path) -> None:
    """Catches a loop over documents of which none is long enough."""
    source = replace(_source("continued", documents), prefix_tokens=450)
    with pytest.raises(
        ConfigError, match=r"calibration\.prefix_tokens: no document of the part 'calibration'"
    ):
        _cut(source, tiny)


@pytest.mark.parametrize("kind", KINDS)
def test_same_and_mixtures_take_every_recipe(kind: str, documents: Path) -> None:
    """Catches fields of a recipe that a mixture or 'same' loses."""
    source = _source(kind, documents)
    resolved = Same(num_sequences=2).resolve(source)
    assert resolved == replace(source, num_sequences=2)
    parts = Mixture(
        parts={"a": source, "b": Vocabulary()}, weights={"a": 3, "b": 1}, num_sequences=8, length=20
    )
    assert parts.resolve()["a"] == replace(source, num_sequences=6, length=20)


def test_options_build_in_a_mixture() -> None:
    """Catches an option with a nested source that composes at the top level only."""
    config = compose_run(["calibration=mixture", "+calibration@calibration.parts.mine=continued"]).config
    mixture = build(config["calibration"], "calibration")
    assert isinstance(mixture.parts["mine"], Continued)
    assert mixture.parts["mine"].prefixes.identity() == Web().identity()
