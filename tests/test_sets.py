"""Sets of windows and how they are selected: disjoint, reproducible, and what they say they are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import plan_of, write_documents
from reprune.build import build
from reprune.calibration.corpora import Domain, Web
from reprune.calibration.generated import Generated
from reprune.calibration.mixture import Mixture
from reprune.calibration.same import Same
from reprune.calibration.source import TextSet, TextSource
from reprune.calibration.splits import documents_of
from reprune.calibration.tokens import Tokens
from reprune.calibration.vocabulary import Vocabulary
from reprune.calibration.windows import cut_windows
from reprune.compose import compose_run
from reprune.errors import ConfigError
from reprune.model.assets import TEXTS
from reprune.model.description import load_tokenizer
from reprune.model.loading import LoadedModel
from reprune.model.tiny import byte_tokenizer
from support import load_tiny

LENGTH = 24
CUTS: list[Any] = ["crop", "pack", "first"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token a byte, BOS in front of every text."""
    return byte_tokenizer(add_bos=True)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 40 random documents of different lengths."""
    path = tmp_path_factory.mktemp("text") / "mine.jsonl"
    texts = write_documents(path)
    lines = path.read_text().splitlines()
    assert len(texts) == len(lines)
    # Of different lengths, so that a selection by length has something to choose.
    path.write_text("".join(line[: 80 + 8 * i] + '"}\n' for i, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """A tiny model that tells texts apart."""
    return load_tiny(num_blocks=1)


def _source(path: Path, **more: Any) -> Domain:
    return Domain(**{"domain": str(path), "num_sequences": 4, "length": LENGTH, **more})


def _cut(source: TextSource, tokenizer: Any, seed: int = 0, **more: Any) -> TextSet:
    arguments = {"role": "calibration", "model": None, "key": "calibration", **more}
    return cut_windows(source, tokenizer=tokenizer, seed=seed, **arguments)


def _rows(text: TextSet) -> set[tuple[int, ...]]:
    return {tuple(row) for row in text.tokens_NT.tolist()}


def _refused(source: Any, tokenizer: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        _cut(source, tokenizer)
    return caught.value


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("bos", ["each_window", "as_tokenised"])
def test_sets_are_slices_of_one_stream(documents: Path, tokenizer: Any, cut: Any, bos: Any) -> None:
    """Catches sets that share a window, and a set 0 that is not what there was before there were sets."""
    one = _source(documents, cut=cut, bos=bos)
    everything = _cut(replace(one, num_sequences=12), tokenizer)
    sets = [_cut(replace(one, set=number), tokenizer) for number in range(3)]
    assert torch.equal(torch.cat([text.tokens_NT for text in sets]), everything.tokens_NT)
    assert torch.equal(_cut(one, tokenizer).tokens_NT, sets[0].tokens_NT)
    for first, second in itertools.combinations(sets, 2):
        assert not _rows(first) & _rows(second)
    again = _cut(replace(one, set=1), tokenizer)
    assert torch.equal(again.tokens_NT, sets[1].tokens_NT)
    assert not torch.equal(_cut(replace(one, set=1), tokenizer, seed=1).tokens_NT, sets[1].tokens_NT)


def test_set_zero_is_what_there_was(documents: Path, tokenizer: Any) -> None:
    """Catches windows that the fields moved: crop by hand, from the documents and the stream's own generator."""
    from reprune.files import sha256_of_json
    from reprune.seeding import generator

    source = _source(documents, num_sequences=3)
    name = ("text", sha256_of_json(source.identity()), "calibration", LENGTH, "each_window", "crop")
    chooser = generator(0, *name, "windows")
    there = documents_of(source.corpus("c"), "calibration", tokenizer, "c")
    expected = []
    for place in torch.randperm(len(there), generator=chooser).tolist():
        ids = tokenizer(there[place].text, add_special_tokens=False)["input_ids"]
        count = len(ids) // (LENGTH - 1)
        if count:
            start = int(torch.randint(len(ids) - count * (LENGTH - 1) + 1, (1,), generator=chooser))
            turn = torch.randperm(count, generator=chooser).tolist()[0]
            begin = start + turn * (LENGTH - 1)
            expected.append([tokenizer.bos_token_id, *ids[begin : begin + LENGTH - 1]])
    assert _cut(source, tokenizer).tokens_NT.tolist() == expected[:3]


@pytest.mark.parametrize("cut", CUTS)
def test_more_sets_than_there_are(documents: Path, tokenizer: Any, cut: Any) -> None:
    """Catches a short set, windows used again, and a message without the arithmetic."""
    source = _source(documents, cut=cut)
    there = len(_cut(replace(source, num_sequences=None), tokenizer).tokens_NT)
    last = there // 4 - 1
    assert len(_cut(replace(source, set=last), tokenizer).tokens_NT) == 4
    error = _refused(replace(source, set=last + 1), tokenizer)
    assert error.key == "calibration.set"
    for word in (
        f"set {last + 1} is asked for",
        "4 windows of 23 tokens",
        f"has {there}",
        f"enough for {last + 1} sets",
    ):
        assert word in error.screen(), error.screen()


def test_cut_first_takes_the_heads_of_documents(documents: Path, tokenizer: Any) -> None:
    """Catches windows from inside a document, or two of one."""
    source = _source(documents, cut="first", num_sequences=None)
    corpus = source.corpus("c")
    heads = {
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"][: LENGTH - 1])
        for text in corpus.documents
    }
    cut = _cut(source, tokenizer)
    rows = [tuple(row[1:]) for row in cut.tokens_NT.tolist()]
    assert set(rows) <= heads
    assert len(rows) == len(cut.document_ids)
    there = documents_of(corpus, "calibration", tokenizer, "c")
    assert set(cut.document_ids) == {document.id for document in there}


@pytest.mark.parametrize("cut", ["crop", "first"])
def test_endless_sets(tokenizer: Any, cut: Any) -> None:
    """Catches endless sources whose sets are one, or are not the same a second time."""
    source = Vocabulary(num_sequences=5, length=LENGTH, cut=cut)
    sets = [_cut(replace(source, set=number), tokenizer) for number in range(4)]
    for first, second in itertools.combinations(sets, 2):
        assert not _rows(first) & _rows(second)
    for number, text in enumerate(sets):
        assert torch.equal(_cut(replace(source, set=number), tokenizer).tokens_NT, text.tokens_NT)
        more = _cut(replace(source, set=number, num_sequences=7), tokenizer)
        assert torch.equal(more.tokens_NT[:5], text.tokens_NT), "a larger set begins with the smaller"


def test_generated_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches generated sets that come from one stream or from each other's cache."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path))
    model = load_tiny(num_blocks=1)
    source = Generated(num_sequences=3, length=12, language=None, max_new_tokens=16, batch_size=2)
    sets = [_cut(replace(source, set=number), model.tokenizer, model=model) for number in (0, 1, 0, 1)]
    assert sets[0].key == sets[2].key
    assert sets[1].key == sets[3].key
    assert not _rows(sets[0]) & _rows(sets[1])


@pytest.mark.parametrize("cut", ["crop", "first"])
def test_longest_by_brute_force(documents: Path, tokenizer: Any, cut: Any) -> None:
    """Catches windows of other documents than the longest."""
    source = _source(documents, cut=cut, selection="longest", num_sequences=5)
    there = documents_of(source.corpus("c"), "calibration", tokenizer, "c")
    lengths = {document.id: len(document.text or "") for document in there}
    chosen = _cut(source, tokenizer)
    # `crop` gives several windows of a long document; every document in front of the last chosen one is longer.
    shortest = min(lengths[name] for name in chosen.document_ids)
    rest = [length for name, length in lengths.items() if name not in chosen.document_ids]
    assert max(rest) <= shortest
    if cut == "first":
        assert sorted(lengths.values())[-5:] == sorted(lengths[name] for name in chosen.document_ids)
    everything = _cut(replace(source, selection="random", num_sequences=None), tokenizer)
    assert _rows(chosen) <= _rows(everything)
    second = _cut(replace(source, set=1), tokenizer)
    assert not _rows(chosen) & _rows(second)
    assert max(lengths[name] for name in second.document_ids) <= min(
        lengths[name] for name in chosen.document_ids
    )


def test_pool_limits_what_is_chosen_from(documents: Path, tokenizer: Any) -> None:
    """Catches a pool that is not looked at: the longest of the first eight windows."""
    source = _source(documents, cut="first", selection="longest", num_sequences=3, pool=8)
    pool = _cut(replace(source, selection="random", pool=None, num_sequences=8), tokenizer)
    chosen = _cut(source, tokenizer)
    assert _rows(chosen) <= _rows(pool)
    assert _cut(replace(source, pool=None), tokenizer).key != chosen.key
    error = _refused(replace(source, num_sequences=9), tokenizer)
    for word in ("9 windows", "has 8", "after the selection by longest"):
        assert word in error.screen()


def _losses(model: LoadedModel, rows: torch.Tensor) -> list[float]:
    found = []
    for row in rows:
        logits = model.logits(row[None])[0, :-1].double()
        found.append(float(-torch.log_softmax(logits, -1).gather(1, row[1:, None]).mean()))
    return found


@pytest.mark.parametrize("band", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
@pytest.mark.parametrize("cut", ["crop", "pack"])
@torch.no_grad()
def test_perplexity_by_brute_force(
    documents: Path, model: LoadedModel, cut: Any, band: tuple[float, float]
) -> None:
    """Catches quantiles of something else than the dense model's own likelihood of the window."""
    source = _source(documents, cut=cut, selection="perplexity", band=band, pool=20, num_sequences=4)
    assert source.needs_model
    pool = _cut(_source(documents, cut=cut, num_sequences=20), model.tokenizer).tokens_NT
    losses = _losses(model, pool)
    order = sorted(range(20), key=losses.__getitem__)
    inside = order[int(band[0] * 20) : int(band[1] * 20)]
    expected = pool[sorted(inside)]
    chosen = [_cut(replace(source, set=number), model.tokenizer, model=model) for number in (0, 1)]
    assert torch.equal(torch.cat([text.tokens_NT for text in chosen]), expected[:8])


def test_perplexity_of_an_endless_source(model: LoadedModel) -> None:
    """Catches an endless pool, and a pool too small for the band without the arithmetic."""
    source = Vocabulary(num_sequences=4, length=LENGTH, selection="perplexity", pool=12, band=(0.0, 0.5))
    text = _cut(source, model.tokenizer, model=model)
    pool = _cut(Vocabulary(num_sequences=12, length=LENGTH), model.tokenizer)
    losses = dict(zip(map(tuple, pool.tokens_NT.tolist()), _losses(model, pool.tokens_NT), strict=True))
    assert all(losses[row] <= sorted(losses.values())[5] for row in _rows(text))
    with pytest.raises(ConfigError, match="7 windows are asked for, the selection leaves 6") as caught:
        _cut(replace(source, num_sequences=7), model.tokenizer, model=model)
    assert caught.value.key == "calibration.pool"


@pytest.mark.parametrize(
    ("kind", "wrong", "key"),
    [
        (Domain, {"set": -1}, "set"),
        (Domain, {"set": 1, "num_sequences": None}, "num_sequences"),
        (Domain, {"selection": "longest", "num_sequences": None}, "num_sequences"),
        (Domain, {"selection": "perplexity", "band": (0.5, 0.5)}, "band"),
        (Domain, {"selection": "perplexity", "band": (-0.1, 0.5)}, "band"),
        (Domain, {"selection": "perplexity", "band": (0.1, 1.5)}, "band"),
        (Domain, {"selection": "perplexity", "band": (0.1,)}, "band"),
        (Domain, {"pool": 8}, "pool"),
        (Domain, {"pool": 0, "selection": "longest"}, "pool"),
        (Vocabulary, {"selection": "longest"}, "pool"),
        (Tokens, {"path": "x.safetensors", "set": 1, "num_sequences": 2}, "set"),
        (Tokens, {"path": "x.safetensors", "selection": "longest", "num_sequences": 2}, "selection"),
    ],
)  # fmt: skip
def test_refused_choices(kind: Any, wrong: dict[str, Any], key: str) -> None:
    """Catches sets and selections that mean nothing, told only when the model is loaded."""
    with pytest.raises(ConfigError) as caught:
        kind(**wrong)
    assert caught.value.key == key


def test_mixture_passes_the_set_on(documents: Path, tokenizer: Any) -> None:
    """Catches a mixture whose parts stay at set 0, and one that overrules the parts' own sets unasked."""
    parts = {"mine": _source(documents), "words": Vocabulary(num_sequences=3, length=LENGTH, set=2)}
    own = Mixture(parts=parts).resolve()
    assert [part.set for part in own.values()] == [0, 2]
    third = Mixture(parts=parts, set=3).resolve()
    assert [part.set for part in third.values()] == [3, 3]
    assert not _rows(_cut(own["mine"], tokenizer)) & _rows(_cut(third["mine"], tokenizer))


def test_same_takes_the_mask_datas_choice(documents: Path) -> None:
    """Catches a probe of `same` that is chosen another way than the text it stands beside."""
    mask = _source(documents, set=2, selection="longest", pool=30)
    same = Same().resolve(mask)
    assert (same.set, same.selection, same.pool) == (2, "longest", 30)
    assert Same(set=1).resolve(mask).set == 1


def _hash(tmp_path: Path, documents: Path, *more: str) -> str:
    text = ["calibration=domain", f"calibration.domain={documents}", "calibration.num_sequences=2"]
    given = [
        *text,
        "calibration.cut=pack",
        "calibration@probes.held_out=vocabulary",
        "probes.held_out.length=16",
    ]
    return plan_of(tmp_path / "out", *given, *more).folder.path.name


def test_run_is_another_with_another_set(tmp_path: Path, documents: Path) -> None:
    """Catches two sets in one run folder, and defaults that move every run."""
    base = _hash(tmp_path, documents)
    assert base == _hash(tmp_path, documents, "calibration.set=0", "calibration.selection=random")
    others = [
        ("calibration.set=1",),
        ("calibration.set=2",),
        ("calibration.selection=longest",),
        ("calibration.selection=longest", "calibration.pool=20"),
        ("calibration.selection=perplexity",),
        ("calibration.selection=perplexity", "calibration.band=[0.0,0.5]"),
    ]
    names = [_hash(tmp_path, documents, *more) for more in others]
    assert len({base, *names}) == len(others) + 1
    # The band means nothing to another selection.
    assert base == _hash(tmp_path, documents, "calibration.band=[0.0,0.5]")


def test_defaults_leave_the_identity_as_it_was(tmp_path: Path, documents: Path) -> None:
    """Catches keys that get into the hash of runs that do not use them, so that old results are not found."""
    text = ["calibration=domain", f"calibration.domain={documents}"]
    identity = plan_of(tmp_path / "out", *text).identity["texts"][0]
    assert set(identity) == {"name", "use", "part", "num_sequences", "length", "bos", "cut", "text"}


def test_set_of_tokens_is_refused(tmp_path: Path) -> None:
    """Catches exact tokens that are sliced."""
    save_file({"input_ids": torch.randint(2, 258, (6, 16))}, tmp_path / "ids.safetensors")
    given = [
        "calibration=tokens",
        f"calibration.path={tmp_path / 'ids.safetensors'}",
        "~calibration@probes.held_out",
    ]
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", *given, "calibration.set=1")
    assert caught.value.key == "calibration.set"
    plan_of(tmp_path / "out", *given)


@pytest.mark.real
@pytest.mark.parametrize(("count", "sets"), [(32, 3), (16, 7), (8, 15)])
def test_sets_of_the_package_index_text(count: int, sets: int) -> None:
    """Catches fewer sets of packed C4 windows than the documentation says there are."""
    TEXTS.fetch()
    tokenizer = load_tokenizer(build(compose_run(["model=smollm2_135m"]).config["model"], "model"))
    source = Web(num_sequences=count, length=256, cut="pack")
    assert len(_cut(replace(source, set=sets - 1), tokenizer).tokens_NT) == count
    assert f"enough for {sets} sets" in _refused(replace(source, set=sets), tokenizer).screen()
