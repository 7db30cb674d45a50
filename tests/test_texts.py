"""Texts: the same windows for the same seed, every document in one part, nothing of one text in another."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers import perplexity_on, plan_of, write_documents
from reprune.build import build
from reprune.calibration.corpora import Domain
from reprune.calibration.corpus import BUILTIN_FILES, builtin_corpus
from reprune.calibration.generated import Generated
from reprune.calibration.mixture import Mixture
from reprune.calibration.same import Same
from reprune.calibration.source import TextSet, TextSource
from reprune.calibration.splits import SHARES, documents_of
from reprune.calibration.tokens import Tokens
from reprune.calibration.vocabulary import Vocabulary
from reprune.calibration.windows import cut_windows
from reprune.compose import compose_run
from reprune.errors import ConfigError
from reprune.model.assets import TEXTS
from reprune.model.description import load_tokenizer
from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel, load_model
from reprune.model.tiny import TinyModel, byte_tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token a byte, BOS in front of every text."""
    return byte_tokenizer(add_bos=True)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 40 random documents of about 400 bytes."""
    path = tmp_path_factory.mktemp("text") / "mine.jsonl"
    write_documents(path)
    return path


def _sources(path: Path) -> dict[str, TextSource]:
    return {
        "vocabulary": Vocabulary(num_sequences=6, length=LENGTH),
        "crop": Domain(domain=str(path), num_sequences=6, length=LENGTH),
        "pack": Domain(domain=str(path), num_sequences=6, length=LENGTH, cut="pack"),
        "packed over documents": Domain(domain=str(path), num_sequences=6, length=900, cut="pack"),
    }


KINDS = ["vocabulary", "crop", "pack", "packed over documents"]


def _cut(
    source: TextSource, tokenizer: Any, seed: int = 0, role: Any = "calibration", **more: Any
) -> TextSet:
    return cut_windows(
        source, role=role, tokenizer=tokenizer, model=more.get("model"), seed=seed, key="calibration"
    )


def _shuffle_global_state() -> None:
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    random.seed()
    torch.rand(17)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_windows(kind: str, documents: Path, tokenizer: Any) -> None:
    """Catches windows that depend on global seeds or on what was cut before."""
    sources = _sources(documents)
    first = {name: _cut(source, tokenizer).tokens_NT for name, source in sources.items()}
    _shuffle_global_state()
    backwards = {name: _cut(source, tokenizer).tokens_NT for name, source in reversed(sources.items())}
    assert torch.equal(first[kind], backwards[kind])
    again = _cut(sources[kind], tokenizer)
    assert torch.equal(first[kind], again.tokens_NT)
    assert again.tokens_NT.dtype == torch.int64
    assert again.tokens_NT.shape == (6, sources[kind].length)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_other_windows(kind: str, documents: Path, tokenizer: Any) -> None:
    """Catches a seed that does not reach the text: such arms would all see one draw."""
    source = _sources(documents)[kind]
    drawn = {_cut(source, tokenizer, seed=seed).key for seed in range(4)}
    assert len(drawn) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [7, 9])
def test_more_sequences_keep_the_first(kind: str, more: int, documents: Path, tokenizer: Any) -> None:
    """Catches counts that are not comparable because every size draws other windows."""
    source = _sources(documents)[kind]
    few = _cut(source, tokenizer).tokens_NT
    many = _cut(replace(source, num_sequences=more), tokenizer).tokens_NT
    assert torch.equal(many[: len(few)], few)
    assert not (many[len(few) :, None] == few[None]).all(-1).any(), "a window was drawn twice"


def test_parts_share_no_document(documents: Path, tokenizer: Any) -> None:
    """Catches a document in two parts, also across seeds: what is held out is held out for every seed."""
    source = replace(_sources(documents)["crop"], num_sequences=None)
    owners: dict[str, set[str]] = defaultdict(set)
    for seed, part in itertools.product(range(3), SHARES):
        text = _cut(source, tokenizer, seed=seed, role=part)
        assert text.document_ids
        for document in text.document_ids:
            owners[document].add(part)
    assert len(owners) == 40
    assert {len(parts) for parts in owners.values()} == {1}


def test_split_does_not_depend_on_the_seed(documents: Path, tokenizer: Any) -> None:
    """Catches a seed that moves documents from evaluation into calibration."""
    source = replace(_sources(documents)["crop"], num_sequences=None)
    for part in SHARES:
        parts = {frozenset(_cut(source, tokenizer, seed=seed, role=part).document_ids) for seed in range(3)}
        assert len(parts) == 1, part


def test_shares_of_the_parts(documents: Path, tokenizer: Any) -> None:
    """Catches parts that starve: a share is kept within two documents."""
    corpus = Domain(domain=str(documents)).corpus("calibration")
    for part, share in SHARES.items():
        there = len(documents_of(corpus, part, tokenizer, "calibration"))
        assert abs(there - 40 * share) <= 2, part


def test_repeated_passage_leaves_the_calibration_part(tmp_path: Path, tokenizer: Any) -> None:
    """Catches duplicates across the split: documents that repeat held-out passages must not calibrate."""
    path = tmp_path / "mine.jsonl"
    texts = write_documents(path)
    # Every third document ends with its neighbour's first 200 characters.
    texts = [text + (texts[i - 1][:200] if i % 3 == 0 else "") for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = Domain(domain=str(path)).corpus("calibration")
    parts = {part: [d.text or "" for d in documents_of(corpus, part, tokenizer, "c")] for part in SHARES}
    held_out = [text for part in SHARES if part != "calibration" for text in parts[part]]
    size = 64
    runs = {text[i : i + size] for text in held_out for i in range(len(text) - size + 1)}
    for text in parts["calibration"]:
        assert not any(text[i : i + size] in runs for i in range(len(text) - size + 1))
    kept = sum(map(len, parts.values()))
    assert 15 < kept < 40, "nothing was left out, or nearly everything"


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("bos", ["each_window", "as_tokenised", None])
@pytest.mark.parametrize("kind", ["vocabulary", "crop", "pack"])
def test_bos(kind: str, bos: Any, adds: bool, documents: Path) -> None:
    """Catches a missing, a second, or a misplaced BOS."""
    tokenizer = byte_tokenizer(add_bos=adds)
    source = replace(_sources(documents)[kind], bos=bos)
    text = _cut(source, tokenizer)
    resolved = bos or ("each_window" if adds else "as_tokenised")
    assert text.bos == resolved
    heads = text.tokens_NT[:, 0] == tokenizer.bos_token_id
    inside = (text.tokens_NT[:, 1:] == tokenizer.bos_token_id).sum()
    if resolved == "each_window":
        assert heads.all()
        assert inside == 0
    elif not adds or kind == "vocabulary":
        assert not heads.any()
        assert inside == 0
    elif kind == "pack":
        # Each document brings its own, and windows begin wherever the one before ends.
        assert heads[0]
        assert not heads.all()


def test_each_window_needs_a_bos(documents: Path) -> None:
    """Catches a window that begins with None, or with token 0 in its stead."""
    tokenizer = byte_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="no BOS token"):
        _cut(replace(_sources(documents)["crop"], bos="each_window"), tokenizer)


def test_crop_windows_lie_inside_one_document(documents: Path, tokenizer: Any) -> None:
    """Catches windows over the seam of two documents, and document ids that are not theirs."""
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    cut = _cut(replace(_sources(documents)["crop"], num_sequences=None), tokenizer)
    windows = [tokenizer.decode(row[1:]) for row in cut.tokens_NT]
    for window in windows:
        assert sum(window in text for text in texts) == 1
    per_text = [[w for w in windows if w in text] for text in texts]
    for text, own in zip(texts, per_text, strict=True):
        assert len(own) in (0, len(text) // (LENGTH - 1)), "all whole windows of a document are used, or none"
        places = sorted(text.index(window) for window in own)
        assert all(b - a >= LENGTH - 1 for a, b in itertools.pairwise(places)), "windows overlap"


def test_first_windows_come_from_different_documents(documents: Path, tokenizer: Any) -> None:
    """Catches eight windows that are all one document."""
    cut = _cut(replace(_sources(documents)["crop"], num_sequences=12), tokenizer)
    assert len(cut.document_ids) == 12


def test_pack_joins_documents_by_end_of_text(documents: Path, tokenizer: Any) -> None:
    """Catches tokens lost or repeated at the seams: but for the BOS at their heads, packed windows are the documents in a row."""
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    cut = _cut(replace(_sources(documents)["pack"], num_sequences=None), tokenizer)
    stream = cut.tokens_NT.reshape(-1)
    stream = stream[stream != tokenizer.bos_token_id]
    ends = (stream == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
    assert len(ends) >= 5
    starts = [0, *(end + 1 for end in ends)]
    found = [tokenizer.decode(stream[start:end]) for start, end in zip(starts, ends, strict=False)]
    assert set(found) <= set(texts)
    assert len(set(found)) == len(found)


def test_vocabulary_is_uniform_without_special_tokens(tokenizer: Any) -> None:
    """Catches special tokens among the drawn, and a draw that misses part of the vocabulary."""
    cut = _cut(Vocabulary(num_sequences=60, length=100), tokenizer)
    body = cut.tokens_NT[:, 1:].reshape(-1)
    assert not set(body.tolist()) & set(tokenizer.all_special_ids)
    counts = torch.bincount(body, minlength=len(tokenizer))[2:]
    assert len(counts) == 256
    assert counts.min() > 0
    assert counts.max() < 4 * counts.float().mean()


@pytest.mark.parametrize("bos", ["each_window", "as_tokenised", None])
@pytest.mark.parametrize(("count", "length"), [(None, None), (3, None), (3, 5), (None, 5), (5, 9)])
def test_tokens_are_exactly_those_of_the_file(
    tmp_path: Path, tokenizer: Any, bos: Any, count: int | None, length: int | None
) -> None:
    """Catches rows that are shuffled, cropped elsewhere or given a second BOS."""
    ids = torch.randint(2, 258, (5, 9), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    source = Tokens(path=str(tmp_path / "ids.safetensors"), num_sequences=count, length=length, bos=bos)
    cut = _cut(source, tokenizer, seed=3)
    assert torch.equal(cut.tokens_NT, ids[: count or 5, : length or 9])


@pytest.mark.parametrize(
    ("tensors", "arguments", "words"),
    [
        ({"input_ids": torch.full((2, 4), 258)}, {}, "outside the vocabulary"),
        ({"input_ids": torch.full((2, 4), -1)}, {}, "outside the vocabulary"),
        ({"input_ids": torch.ones(2, 4)}, {}, r"int64 \[sequences, length\]"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, {}, r"int64 \[sequences, length\]"),
        ({"inputids": torch.ones(2, 4, dtype=torch.long)}, {}, "did you mean 'inputids'"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, {"num_sequences": 3}, "the file has 2 × 4"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, {"length": 5}, "the file has 2 × 4"),
    ],
)
def test_wrong_tokens(
    tmp_path: Path, tokenizer: Any, tensors: dict[str, torch.Tensor], arguments: dict[str, int], words: str
) -> None:
    """Catches ids that would index outside the embedding, and files of another shape or type."""
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(ConfigError, match=words):
        _cut(Tokens(path=str(tmp_path / "ids.safetensors"), **arguments), tokenizer)


@given(
    weights=st.lists(st.floats(0, 10), min_size=2, max_size=5).filter(lambda found: sum(found) > 0.01),
    total=st.integers(1, 300),
)
def test_mixture_shares_by_largest_remainder(weights: list[float], total: int) -> None:
    """Catches shares that do not add up, and any that is a whole sequence off."""
    named = {f"part_{i}": weight for i, weight in enumerate(weights)}
    mixture = Mixture(
        parts={name: Vocabulary() for name in named}, weights=named, num_sequences=total, length=8
    )
    counts = {name: source.num_sequences or 0 for name, source in mixture.resolve().items()}
    assert sum(counts.values()) == total
    remainders = {}
    for name, weight in named.items():
        exact = total * weight / sum(weights)
        assert abs(counts.get(name, 0) - exact) < 1
        remainders[name] = exact - int(exact)
    up = [remainders[name] for name in named if counts.get(name, 0) > int(total * named[name] / sum(weights))]
    down = [
        remainders[name] for name in named if counts.get(name, 0) == int(total * named[name] / sum(weights))
    ]
    assert max(down, default=0) <= min(up, default=1) + 1e-9
    assert all(source.length == 8 for source in mixture.resolve().values())


def test_a_part_of_a_mixture_can_be_left_out() -> None:
    """Catches a preset's part that an experiment cannot be rid of."""
    mixture = Mixture(parts={"a": Vocabulary(num_sequences=3), "b": None})
    assert list(mixture.resolve()) == ["a"]
    with pytest.raises(ConfigError, match="at least one part"):
        Mixture(parts={"a": None})


def test_mixture_without_weights_keeps_the_counts() -> None:
    """Catches parts whose own counts are lost."""
    mixture = Mixture(
        parts={"a": Vocabulary(num_sequences=3), "b": Vocabulary(num_sequences=5, length=7)},
        bos="each_window",
    )
    resolved = mixture.resolve()
    assert {name: source.num_sequences for name, source in resolved.items()} == {"a": 3, "b": 5}
    assert resolved["b"].length == 7
    assert {source.bos for source in resolved.values()} == {"each_window"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": {"a": 1.0}}, "go together"),
        ({"num_sequences": 4}, "go together"),
        ({"num_sequences": 4, "weights": {"b": 1.0}}, "one weight for each part"),
        ({"num_sequences": 4, "weights": {"a": 0.0}}, "not all zero"),
        ({"num_sequences": 4, "weights": {"a": -1.0}}, "weights.a"),
        ({"parts": {}}, "at least one part"),
        ({"parts": {"a": Same()}}, "source of its own"),
        ({"parts": {"a": Mixture(parts={"b": Vocabulary()})}}, "source of its own"),
    ],
)
def test_wrong_mixtures(arguments: dict[str, Any], words: str) -> None:
    """Catches mixtures whose shares mean nothing."""
    with pytest.raises(ConfigError, match=words):
        Mixture(**{"parts": {"a": Vocabulary()}, **arguments})


@pytest.fixture
def generated_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; returns where generated text goes."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "generated"


def _tiny(seed: int = 0) -> LoadedModel:
    source = TinyModel(weights_seed=seed)
    return load_model(source, load_tokenizer(source), plan_device("cpu", "float32", None, 1))


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []


GENERATED = Generated(num_sequences=4, length=12, language=None, max_new_tokens=16, batch_size=2)


def test_generated_text_is_drawn_from_its_own_stream(generated_cache: Path) -> None:
    """Catches generated text that depends on global seeds, or that comes from the cache of another seed."""
    model = _tiny()
    first = _cut(GENERATED, model.tokenizer, model=model)
    entries = _entries(generated_cache)
    assert entries
    _shuffle_global_state()
    assert _cut(GENERATED, model.tokenizer, model=model).key == first.key
    assert _entries(generated_cache) == entries, "the second time it comes from the cache"
    for entry in entries:
        for path in entry.iterdir():
            path.unlink()
        entry.rmdir()
    _shuffle_global_state()
    assert _cut(GENERATED, model.tokenizer, model=model).key == first.key
    assert _cut(GENERATED, model.tokenizer, seed=1, model=model).key != first.key
    assert _cut(GENERATED, model.tokenizer, role="probe", model=model).key != first.key


def test_generated_text_belongs_to_its_model(generated_cache: Path) -> None:
    """Catches one model's text served to another."""
    one, other = _tiny(), _tiny(seed=1)
    first = _cut(GENERATED, one.tokenizer, model=one)
    before = set(_entries(generated_cache))
    second = _cut(GENERATED, other.tokenizer, model=other)
    assert second.key != first.key
    assert len(set(_entries(generated_cache)) - before) >= 1


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_interrupted_generation_leaves_nothing(
    generated_cache: Path, fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a text that is read as a whole one the next time."""
    model = _tiny()
    whole = _cut(GENERATED, model.tokenizer, model=model).key
    for entry in _entries(generated_cache):
        for path in entry.iterdir():
            path.unlink()
        entry.rmdir()
    working, calls = LoadedModel.logits, itertools.count()

    def breaks(self: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
        if next(calls) == 1:
            raise fault
        return working(self, tokens)

    monkeypatch.setattr(LoadedModel, "logits", breaks)
    with pytest.raises(fault):
        _cut(GENERATED, model.tokenizer, model=model)
    assert not _entries(generated_cache)
    assert _cut(GENERATED, model.tokenizer, model=model).key == whole


def _user_text(path: Path, *more: str) -> list[str]:
    return ["calibration=domain", f"calibration.domain={path}", *more]


def test_evaluation_that_repeats_calibration_is_refused(tmp_path: Path, documents: Path) -> None:
    """Catches perplexity measured on a passage that the model was calibrated on."""
    calibration = _user_text(documents, "calibration.length=100")
    plan = plan_of(tmp_path, *calibration)
    passage = plan.tokenizer.decode(plan.texts(None).mask[0].tokens_NT[0, 1:])
    leak = tmp_path / "leak.txt"
    leak.write_text(f"something else before it: {passage} {' '.join(map(str, range(300)))}", encoding="utf-8")
    evaluated = [*perplexity_on(leak=leak), "evaluation.perplexity.length=100"]
    with pytest.raises(
        ConfigError, match=r"(?s)evaluation\.perplexity\.leak.*calibration windows.*allow_overlap"
    ):
        plan_of(tmp_path, *calibration, *evaluated)
    with pytest.raises(ConfigError, match=r"(?s)33\.3%.*at most 33\.0%"):
        plan_of(tmp_path, *calibration, *evaluated, "max_overlap=0.33")
    plan_of(tmp_path, *calibration, *evaluated, "max_overlap=0.34")
    with pytest.raises(ConfigError, match="max_overlap"):
        plan_of(tmp_path, "max_overlap=1.5")
    allowed = plan_of(tmp_path, *calibration, *evaluated, "allow_overlap=true")
    shares = allowed.check_texts(allowed.texts(None))
    assert shares["evaluation.perplexity.leak"] == pytest.approx(1 / 3)
    clean = tmp_path / "clean.jsonl"
    write_documents(clean, seed=9)
    plan_of(tmp_path, *calibration, *perplexity_on(clean=clean), "evaluation.perplexity.length=100")


@pytest.mark.parametrize("role", ["probes", "validation", "evaluation"])
def test_document_with_two_roles_is_refused(tmp_path: Path, documents: Path, role: str) -> None:
    """Catches one document used to calibrate and to judge."""
    more = {
        "probes": ["probes.held_out.split=calibration"],
        "validation": ["+calibration@validation.tuning=same", "validation.tuning.split=calibration"],
        "evaluation": [*perplexity_on(whole=documents)],
    }[role]
    with pytest.raises(ConfigError, match=rf"{role}.*is also used as calibration text"):
        plan_of(tmp_path, *_user_text(documents, "calibration.num_sequences=12"), *more)


@pytest.mark.real
def test_no_held_out_run_of_13_tokens_stands_in_the_calibration_text() -> None:
    """Catches leaks between the real texts, by brute force and independent of calibration/overlap.py.

    A run of 13 tokens of a probe or an evaluation document may stand in a calibration document only if it is in five
    documents or more.
    """
    TEXTS.fetch()
    tokenizer = load_tokenizer(build(compose_run(["model=smollm2_135m"]).config["model"], "model"))

    def runs(text: str) -> Iterator[tuple[int, ...]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return zip(*(ids[i:] for i in range(13)), strict=False)

    corpora = {name: builtin_corpus(name, "calibration") for name in BUILTIN_FILES}
    parts = {
        (name, part): [
            document.text or "" for document in documents_of(corpus, part, tokenizer, "calibration")
        ]
        for name, corpus in corpora.items()
        for part in SHARES
    }
    assert all(parts.values()), "a part of a text is empty"
    held_out: set[tuple[int, ...]] = set()
    for (_, part), texts in parts.items():
        if part in ("probe", "evaluation"):
            held_out.update(itertools.chain.from_iterable(map(runs, texts)))
    shared = {
        run
        for (_, part), texts in parts.items()
        if part == "calibration"
        for text in texts
        for run in runs(text)
        if run in held_out
    }
    owners: dict[tuple[int, ...], int] = defaultdict(int)
    for corpus in corpora.values():
        for text in corpus.documents:
            for run in shared.intersection(runs(text)):
                owners[run] += 1
    rare = [tokenizer.decode(run) for run in shared if owners[run] < 5]
    assert not rare, rare[:5]


@pytest.mark.real
@pytest.mark.parametrize("option", ["web", "wiki", "code", "technical", "stories"])
def test_real_parts_share_no_document_and_suffice(option: str) -> None:
    """Catches a document in two parts of a real text, and a filter that leaves too little for the option's default."""
    TEXTS.fetch()
    config = compose_run(["model=smollm2_135m", f"calibration={option}"]).config
    tokenizer = load_tokenizer(build(config["model"], "model"))
    corpus = builtin_corpus(option, "calibration")
    owners: dict[str, set[str]] = defaultdict(set)
    for part in SHARES:
        for document in documents_of(corpus, part, tokenizer, "calibration"):
            owners[document.id].add(part)
    assert {len(parts) for parts in owners.values()} == {1}
    cut = _cut(build(config["calibration"], "calibration"), tokenizer)
    assert cut.tokens_NT.shape == (32, 256)
    assert len(cut.document_ids) >= 8
