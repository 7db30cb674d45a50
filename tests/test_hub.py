"""Texts from outside: data sets of the hub, their mirrors and caches, and files in every format."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from pyarrow import parquet

from helpers import plan_of, write_documents
from reprune.build import build
from reprune.calibration.corpora import Domain
from reprune.calibration.hub import HubText
from reprune.calibration.windows import cut_windows
from reprune.errors import ConfigError
from reprune.model.assets import TEXTS
from reprune.model.tiny import byte_tokenizer
from support import CONF, option, options

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- config_name: first
  data_files:
  - split: train
    path: data/train-*
- config_name: second
  data_files:
  - split: train
    path: more/*
  - split: test
    path: held/*
---
Two configs.
"""


def _texts(start: int, count: int) -> list[str]:
    return [f"document {number}: " + f"word{number} " * 40 for number in range(start, start + count)]


def _rows(texts: Sequence[str | None], column: str = "text") -> bytes:
    return "".join(json.dumps({column: text, "url": "u"}) + "\n" for text in texts).encode()


def _repository(folder: Path, packed: bool) -> Path:
    """A data set's repository with two configs, in Parquet or in packed JSON lines: a repository has one format."""
    held: dict[str, list[str | None]] = {
        "data/train-00000-of-00001": [*_texts(0, 30), None, ""],
        "more/0": [*_texts(100, 20)],
        "held/0": [*_texts(200, 5)],
    }
    for name, texts in held.items():
        (folder / name).parent.mkdir(parents=True)
        if packed:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(_rows(texts)))
        else:
            table = pyarrow.table({"text": texts, "url": ["u"] * len(texts)})
            parquet.write_table(table, folder / f"{name}.parquet")
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A repository in Parquet."""
    return _repository(tmp_path / "mirror", packed=False)


@pytest.fixture(autouse=True)
def _caches_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """No cache of the machine's user is read or written."""
    if "real" not in request.keywords:
        monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def _error(call: Callable[[], Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    assert len(caught.value.screen().splitlines()) < 10
    return caught.value


@pytest.mark.parametrize(
    ("config", "data_split", "expected"),
    [
        ("first", "train", _texts(0, 30)),
        ("second", "train", _texts(100, 20)),
        ("second", "test", _texts(200, 5)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_mirror_gives_config_and_split(
    tmp_path: Path, packed: bool, config: str, data_split: str, expected: list[str]
) -> None:
    """Catches another config or split than the one that was asked for, and rows without text taken as documents."""
    mirror = _repository(tmp_path / "mirror", packed)
    source = HubText(dataset="owner/name", config=config, data_split=data_split, mirror=str(mirror))
    corpus = source.corpus("calibration")
    assert list(corpus.documents) == [text.strip() for text in expected]
    assert not corpus.builtin
    assert source.name == "name"
    assert source.identity()["used"] == "mirror"
    assert list(replace(source, num_documents=3).corpus("c").documents) == list(corpus.documents[:3])


def test_mirror_without_a_readme(mirror: Path) -> None:
    """Catches a copy of one config's folder that only the hub's README makes readable."""
    (mirror / "README.md").unlink()
    source = HubText(dataset="owner/name", config="more", mirror=str(mirror))
    assert len(source.corpus("calibration").documents) == 20


def test_mirror_of_one_config_and_split(mirror: Path) -> None:
    """Catches a mirror that has to be the whole of a set of terabytes."""
    for name in ("data", "held"):
        shutil.rmtree(mirror / name)
    source = HubText(dataset="owner/name", config="second", mirror=str(mirror))
    assert len(source.corpus("calibration").documents) == 20


def test_mirror_is_known_by_its_content(mirror: Path, tmp_path: Path) -> None:
    """Catches text of a mirror as it was before, and an identity that a path gets into."""
    source = HubText(dataset="owner/name", config="second", mirror=str(mirror))
    before = source.identity()
    shutil.copytree(mirror, tmp_path / "elsewhere")
    assert replace(source, mirror=str(tmp_path / "elsewhere")).identity() == before
    parquet.write_table(pyarrow.table({"text": _texts(300, 20)}), mirror / "more" / "0.parquet")
    assert source.identity() != before


@pytest.mark.parametrize(
    ("wrong", "key", "words"),
    [
        ({"config": "third"}, "c.config", ("third", "first", "second")),
        ({"data_split": "tset"}, "c.data_split", ("tset", "train")),
        ({"text_field": "txt"}, "c.text_field", ("no such column", "text, url", "did you mean 'text'?")),
        ({"mirror": "/no/such/mirror"}, "c.mirror", ("no folder /no/such/mirror", "mirror=FOLDER", "fallback=web")),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(
    mirror: Path, wrong: dict[str, Any], key: str, words: tuple[str, ...]
) -> None:
    """Catches a stack trace of `datasets` in place of the key and of what there is."""
    source = HubText(**{"dataset": "owner/name", "config": "first", "mirror": str(mirror), **wrong})
    error = _error(lambda: source.check("c"))
    assert error.key == key, error.screen()
    for word in words:
        assert word in error.screen()


def test_empty_mirror(tmp_path: Path) -> None:
    """Catches a folder without data that counts as an empty text."""
    (tmp_path / "nothing").mkdir()
    source = HubText(dataset="owner/name", mirror=str(tmp_path / "nothing"))
    assert "cannot be read as a data set" in _error(lambda: source.check("c")).screen()


def test_lines_become_articles(tmp_path: Path) -> None:
    """Catches WikiText's lines taken as documents, and section headings taken as titles."""
    lines = [
        "",
        " = One = \n",
        "",
        " a line \n",
        " = = Section = = \n",
        " more \n",
        " = Two = \n",
        " text \n",
    ]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "train.jsonl").write_bytes(_rows(lines))
    source = HubText(dataset="Salesforce/wikitext", join="articles", mirror=str(tmp_path / "m"))
    first, second = source.corpus("calibration").documents
    assert first.split("\n")[0].strip() == "= One ="
    assert "= = Section = =" in first
    assert "more" in first
    assert second == "= Two = \n text"
    assert len(replace(source, num_documents=1).corpus("c").documents) == 1


def test_sentences_become_passages(tmp_path: Path) -> None:
    """Catches sentences taken as documents, none of which is as long as a window, and the last of them left out."""
    sentences = [f"sentence {number}" for number in range(230)]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "train.jsonl").write_bytes(_rows(sentences, "sentence"))
    source = option("calibration", "ptb", config=None, revision=COMMIT, mirror=str(tmp_path / "m"))
    documents = source.corpus("calibration").documents
    assert [len(text.split("sentence ")) - 1 for text in documents] == [100, 100, 30]
    assert " ".join(documents) == " ".join(sentences)


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_says_what_was_tried(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches minutes of retries, and a message without what to do offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = _error(lambda: plan_of(tmp_path / "out", "calibration=c4"))
    before = time.monotonic()
    again = _error(lambda: option("calibration", "c4").check("calibration"))
    assert time.monotonic() - before < 10
    assert again.screen() == error.screen()
    assert error.key == "calibration.dataset"
    words = [
        "allenai/c4",
        "the network",
        "the cache of `datasets`",
        "the hub's cache",
        "mirror=FOLDER",
        "fallback=web",
    ]
    for word in [*words, "HF_HUB_OFFLINE is set" if offline else "refused"]:
        assert word in error.screen(), error.screen()
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_fallback_only_where_it_was_told(caplog: pytest.LogCaptureFixture) -> None:
    """Catches another text than the one asked for without a word in log, name and identity."""
    TEXTS.fetch()
    logging.getLogger("reprune").propagate = True
    source = HubText(dataset="owner/none-of-this", fallback="technical")
    with caplog.at_level(logging.WARNING, logger="reprune"):
        corpus = source.corpus("calibration")
        source.corpus("calibration")
    assert corpus.builtin
    assert corpus.name == source.name == "technical"
    assert source.identity()["used"] == "fallback technical"
    told = [record.getMessage() for record in caplog.records if "INSTEAD" in record.getMessage()]
    assert len(told) == 1
    for word in ("owner/none-of-this", "technical", "HF_HUB_OFFLINE"):
        assert word in told[0]
    with pytest.raises(ConfigError, match="cannot be had"):
        replace(source, fallback=None).corpus("calibration")
    tokenizer = byte_tokenizer(add_bos=True)
    cut = cut_windows(source, role="calibration", tokenizer=tokenizer, model=None, seed=0, key="c")
    assert cut.name == "technical"
    assert cut.source["used"] == "fallback technical"


def test_fallback_must_be_a_text_that_is_there() -> None:
    """Catches a slip that shows only without network."""
    with pytest.raises(ConfigError, match="did you mean 'web'"):
        HubText(dataset="owner/name", fallback="wbe")


class _Hub:
    """Stands in for the hub: knows one data set, whose files are the mirror's, and counts what it is asked."""

    def __init__(self, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        load = datasets.load_dataset

        def info(api: object, name: str, *, revision: str, timeout: float) -> Any:
            response = SimpleNamespace(headers={}, status_code=404, request=None)
            if name != "owner/name":
                raise RepositoryNotFoundError("no such repository", response=response)
            if revision not in ("main", COMMIT):
                raise RevisionNotFoundError("no such revision", response=response)
            return SimpleNamespace(sha=COMMIT)

        def load_dataset(name: str, config: str | None, **more: Any) -> Any:
            self.asked.append((name, config, more.pop("revision"), more["streaming"]))
            return load(str(mirror), config, **more)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_streams_by_commit_and_keeps_what_it_read(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches whole sets downloaded, a branch that moves between two runs, and later runs that need the network."""
    hub = _Hub(mirror, monkeypatch)
    source = HubText(dataset="owner/name", config="second", num_documents=7)
    first = source.corpus("calibration")
    assert hub.asked == [("owner/name", "second", COMMIT, True)]
    assert source.identity()["used"] == f"hub owner/name@{COMMIT}"
    monkeypatch.undo()
    monkeypatch.setenv("REPRUNE_CACHE", str(mirror.parent / "cache"))
    shutil.rmtree(mirror)
    from reprune.calibration import hub as module

    module._find.cache_clear()
    again = source.corpus("calibration")
    assert again == first
    assert source.identity()["used"] == f"hub owner/name@{COMMIT}"
    for other in ({"num_documents": 8}, {"config": "first"}, {"revision": COMMIT}):
        with pytest.raises(ConfigError, match="cannot be had"):
            replace(source, **other).corpus("calibration")


def test_what_the_hub_does_not_have(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a slip in name or revision that is taken for a network that is down, and so for a case for the fallback."""
    _Hub(mirror, monkeypatch)
    assert _error(lambda: HubText(dataset="owner/nmae", fallback="web").check("c")).key == "c.dataset"
    assert _error(lambda: HubText(dataset="owner/name", revision="v9").check("c")).key == "c.revision"


def test_gated_says_how_to_get_in(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that does not say that a licence has to be accepted."""
    _Hub(mirror, monkeypatch)

    def gated(*_: object, **__: object) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    screen = _error(lambda: HubText(dataset="owner/name").check("c")).screen()
    for word in (
        "gated",
        "accept its licence at https://huggingface.co/datasets/owner/name",
        "hf auth login",
    ):
        assert word in screen


def test_script_is_not_run(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches code of a data set that runs, and an error that does not say where its files are."""
    _Hub(mirror, monkeypatch)

    def script(*_: object, **__: object) -> Any:
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setattr(datasets, "load_dataset", script)
    error = _error(lambda: HubText(dataset="owner/name").check("c"))
    assert error.key == "c.dataset"
    assert "refs/convert/parquet" in error.screen()


@pytest.mark.parametrize("revision", ["main", COMMIT, "f" * 40])
def test_cache_of_datasets(mirror: Path, tmp_path: Path, revision: str) -> None:
    """Catches a set that `load_dataset` prepared and that is not found offline, or taken for another revision."""
    prepared = datasets.load_dataset(str(mirror), "first", split="train", cache_dir=str(tmp_path / "made"))
    place = Path(prepared.cache_files[0]["filename"]).parent
    target = tmp_path / "datasets" / "owner___name" / "first" / "0.0.0" / COMMIT
    shutil.copytree(place, target)
    for path in target.glob("mirror-*.arrow"):
        path.rename(path.with_name(path.name.replace("mirror-", "name-", 1)))
    source = HubText(dataset="owner/name", config="first", revision=revision)
    if revision == "f" * 40:
        assert "another revision" in _error(lambda: source.check("c")).screen()
        return
    assert len(source.corpus("calibration").documents) == 30
    assert source.identity()["used"] == f"hub owner/name@{COMMIT}"


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_cache_of_the_hub(mirror: Path, tmp_path: Path, revision: str) -> None:
    """Catches a repository that `hf download` brought and that is not found offline."""
    repository = tmp_path / "hub" / "datasets--owner--name"
    shutil.copytree(mirror, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    source = HubText(dataset="owner/name", config="second", revision=revision)
    assert len(source.corpus("calibration").documents) == 20
    assert source.identity()["used"] == f"hub owner/name@{COMMIT}"


def test_building_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option that needs the network before it is checked."""

    def forbidden(*_: object, **__: object) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", forbidden)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", forbidden)
    named = [
        name
        for name in options("calibration")
        if "HubText" in (CONF / "calibration" / f"{name}.yaml").read_text()
    ]
    assert len(named) >= 12
    for name in named:
        source = option("calibration", name)
        assert isinstance(source, HubText)
        assert source.fallback is None, "nothing stands in without being told"
        assert source.revision != "main", "pinned"


def test_run_on_a_mirror(mirror: Path, tmp_path: Path) -> None:
    """Catches a source that the run cannot use: the parts of its documents, the record of where they come from."""
    given = ["calibration=cosmopedia", f"calibration.mirror={mirror}", "calibration.config=first"]
    sizes = ["calibration.num_sequences=3", "calibration.length=16"]
    plan = plan_of(tmp_path / "out", *given, *sizes)
    texts = plan.texts(None)
    assert texts.mask[0].source["used"] == "mirror"
    assert not set(texts.mask[0].document_ids) & set(texts.probes[0].document_ids)


def _zst(data: bytes, path: Path) -> bytes:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "list"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_formats_say_the_same(tmp_path: Path, kind: str, packed: str) -> None:
    """Catches a packing or a row format that changes the text."""
    texts = [f"{text}\u2028 and ümlaut" for text in _texts(0, 12)]
    rows = [{"body": text, "n": 1} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = {"txt": "\n\n".join(texts), "list": json.dumps(rows)}.get(kind, lines).encode()
    path = tmp_path / f"mine.{'json' if kind == 'list' else kind}{packed}"
    data = gzip.compress(data) if packed == ".gz" else _zst(data, tmp_path / "t") if packed else data
    path.write_bytes(data)
    corpus = Domain(domain=str(path), text_field="body").corpus("calibration")
    assert corpus.name == "mine"
    if kind == "txt":
        assert "".join("".join(corpus.documents).split()) == "".join("".join(texts).split())
    else:
        assert list(corpus.documents) == texts
    for cut in (data[: len(data) // 2], b"nothing of the kind") if packed else ():
        path.write_bytes(cut)
        assert f"not a whole {packed} file" in _error(lambda: Domain(domain=str(path)).check("c")).screen()


def test_parquet_files(tmp_path: Path) -> None:
    """Catches a column that is not the text, values that are none, and a damaged file."""
    path = tmp_path / "mine.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert Domain(domain=str(path), text_field="body").corpus("c").documents == ("one", "two")
    error = _error(lambda: Domain(domain=str(path), text_field="boddy").check("c"))
    for word in ("no column 'boddy'", "body, n", "did you mean 'body'?", str(path)):
        assert word in error.screen()
    assert "int64" in _error(lambda: Domain(domain=str(path), text_field="n").check("c")).screen()
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a whole Parquet file" in _error(lambda: Domain(domain=str(path)).check("c")).screen()


def test_folder_of_many_formats(tmp_path: Path) -> None:
    """Catches files of a folder that are passed over; a .json beside texts is settings."""
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_rows(["one", "two"])))
    (folder / "b.json.gz").write_bytes(gzip.compress(_rows(["three"])))
    (folder / "c.md").write_text("four\n\nfour and a half")
    (folder / "deep" / "d.txt.gz").write_bytes(gzip.compress(b"five"))
    (folder / "settings.json").write_text('{"no": "text"}')
    (folder / "picture.png").write_bytes(b"\xff\xfe")
    parquet.write_table(pyarrow.table({"text": ["six"]}), folder / "e.parquet")
    corpus = Domain(domain=str(folder)).corpus("c")
    assert corpus.documents == ("one", "two", "three", "four\n\nfour and a half", "five", "six")


def test_empty_sources_say_how_much_was_looked_at(tmp_path: Path) -> None:
    """Catches 'empty' without what there was."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "picture.png").write_bytes(b"x")
    assert "among 1 files" in _error(lambda: Domain(domain=str(folder)).check("c")).screen()
    (folder / "a.txt").write_text(" \n")
    (folder / "b.jsonl").write_bytes(_rows(["", " "]))
    screen = _error(lambda: Domain(domain=str(folder)).check("c")).screen()
    assert "2 files" in screen
    assert "3 documents, none with text" in screen


def test_other_encodings(tmp_path: Path) -> None:
    """Catches text in another encoding read as something else without being told to."""
    path = tmp_path / "mine.txt"
    path.write_bytes(b"good so far \xff and on")
    error = _error(lambda: Domain(domain=str(path)).check("calibration"))
    for word in ("0xff", "offset 12", "calibration.errors=replace", str(path)):
        assert word in error.screen()
    replaced = Domain(domain=str(path), errors="replace")
    assert replaced.corpus("c").documents == ("good so far \ufffd and on",)
    clean = tmp_path / "clean.txt"
    clean.write_text("good so far and on")
    assert Domain(domain=str(clean), errors="replace").identity() == Domain(domain=str(clean)).identity()
    assert replaced.identity() != Domain(domain=str(clean)).identity()
    packed = tmp_path / "mine.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert (
        "offset 12 of what is packed in it" in _error(lambda: Domain(domain=str(packed)).check("c")).screen()
    )


@pytest.mark.parametrize("packed", [False, True])
def test_run_on_a_packed_file(tmp_path: Path, packed: bool) -> None:
    """Catches a packing that gets into a run's identity: the documents are what counts."""
    plain = tmp_path / "mine.jsonl"
    write_documents(plain)
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    given = ["calibration=domain", f"calibration.domain={path if packed else plain}"]
    one = plan_of(tmp_path / "out", *given)
    other = plan_of(tmp_path / "out", "calibration=domain", f"calibration.domain={plain}")
    assert one.folder.path == other.folder.path


def test_wrong_choices_are_refused() -> None:
    """Catches choices that mean nothing."""
    node = {"_target_": "reprune.calibration.hub.HubText", "dataset": "owner/name"}
    for wrong in ({"join": "lines"}, {"num_documents": 0}, {"errors": "replace"}):
        with pytest.raises(ConfigError):
            build({**node, **wrong}, "calibration")
