"""Sources that are data sets of the Hugging Face hub: the first documents of a stream, from the network or offline."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from reprune.cache import cache_root, cached_folder
from reprune.calibration.corpora import CorpusSource
from reprune.calibration.corpus import BUILTIN_FILES, Corpus, builtin_corpus, corpus_of
from reprune.calibration.formats import no_such_column
from reprune.errors import ConfigError, require_option, require_positive
from reprune.files import read_json, write_json

LOG = logging.getLogger("reprune")
CONNECT_SECONDS = 10
HEADING = re.compile(r"\s*= (?!=).*(?<!=) =\s*")

Join = Literal["rows", "articles"]
Rows = Iterable[Mapping[str, Any]]


@dataclass(kw_only=True)
class HubText(CorpusSource):
    """The first `num_documents` documents of the stream that a data set's `config`, `data_split` and `revision` give.

    Nothing more is downloaded, and what was is kept in the project's cache, so that later runs need no network. `revision`
    should be a commit: a branch may move. `join=articles` puts rows together that are lines, an article for each heading
    '= Title ='.

    `mirror` is a folder that is read instead, in the layout of the data set's repository. `fallback` names the
    package-index text that stands in when neither hub nor cache nor mirror can be had; without it that is an error.
    Which it was is part of the identity (`used`).
    """

    dataset: str
    config: str | None = None
    data_split: str = "train"
    revision: str = "main"
    text_field: str = "text"
    join: Join = "rows"
    num_documents: int = 2000
    mirror: str | None = None
    fallback: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(num_documents=self.num_documents)
        if self.fallback is not None:
            require_option("fallback", self.fallback, BUILTIN_FILES)

    @property
    def name(self) -> str:
        """The data set's own name, or that of the text that stands in for it."""
        own = self.dataset.rpartition("/")[2]
        if self.fallback is None:
            return own
        try:
            return self.fallback if self._found("").used.startswith("fallback") else own
        except ConfigError:
            return own  # `check` tells, with the key of the place where the source stands.

    def corpus(self, key: str) -> Corpus:
        """See CorpusSource. Raises ConfigError with what was tried, and for a wrong config, split, revision or column."""
        return self._found(key).corpus

    def identity(self) -> dict[str, Any]:
        """Hash of the documents, where they are said to be from, and where they really came from."""
        found = self._found("calibration")
        names = ("dataset", "config", "data_split", "revision")
        return {
            "text": found.corpus.sha256,
            **{name: getattr(self, name) for name in names},
            "used": found.used,
        }

    def _found(self, key: str) -> Found:
        wanted = _Wanted(**{field.name: getattr(self, field.name) for field in fields(_Wanted)})
        try:
            return _find(wanted, str(cache_root()), _state_of(wanted.mirror))
        except ConfigError as error:
            raise error.under(key) from error


@dataclass(frozen=True)
class Found:
    """A text and where it came from: 'hub NAME@COMMIT', 'mirror' or 'fallback TEXT'."""

    corpus: Corpus
    used: str


@dataclass(frozen=True)
class _Wanted:
    """The fields of a source that say which documents are meant."""

    dataset: str
    config: str | None
    data_split: str
    revision: str
    text_field: str
    join: Join
    num_documents: int
    mirror: str | None
    fallback: str | None


class _UnavailableError(Exception):
    """A place that does not have the text; the message says which and why."""


def _state_of(mirror: str | None) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of every file, so that a mirror that changed is read again."""
    if mirror is None:
        return ()
    files = sorted(path for path in Path(mirror).rglob("*") if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=16)
def _find(wanted: _Wanted, root: str, state: object) -> Found:
    """Once a process, so that every role of a run sees one text; `root` and `state` are part of the question."""
    title = f"{wanted.dataset} {wanted.config or ''}".strip()
    try:
        documents, used = _from_mirror(wanted) if wanted.mirror is not None else _kept(wanted)
    except _UnavailableError as error:
        tried = str(error)
    else:
        if not documents:
            raise ConfigError(
                "dataset", "no row has text", value=f"{title}, {used}, field '{wanted.text_field}'"
            )
        where = f"mirror {wanted.mirror}" if wanted.mirror is not None else used
        LOG.info("text %s: %d documents from %s", title, len(documents), where)
        return Found(corpus_of(wanted.dataset.rpartition("/")[2], documents), used)
    if wanted.fallback is not None:
        found = Found(builtin_corpus(wanted.fallback, "fallback"), f"fallback {wanted.fallback}")
        LOG.warning("text %s: the package-index text '%s' INSTEAD; tried %s", title, wanted.fallback, tried)
        return found
    raise ConfigError(
        "dataset" if wanted.mirror is None else "mirror",
        f"this text cannot be had; tried {tried}",
        value=f"{title} at {wanted.revision}",
        accepted="network; what an earlier run or `datasets` kept; mirror=FOLDER",
        hint=f"offline: copy the repository ('hf download --repo-type dataset {wanted.dataset} --local-dir FOLDER', "
        "with --include 'README.md' and the files of one config and split) and set mirror=FOLDER, or set "
        "fallback=web (or another package-index text) to run on that instead",
    )


def _kept(wanted: _Wanted) -> tuple[list[str], str]:
    """The documents as an earlier run kept them, or else from where they can be had, and kept."""
    names = ("dataset", "config", "data_split", "revision", "text_field", "join", "num_documents")
    key = {name: getattr(wanted, name) for name in names}

    def write(folder: Path) -> None:
        reasons = []
        for place in (_from_network, _from_datasets_cache, _from_hub_cache):
            try:
                documents, used = place(wanted)
            except _UnavailableError as error:
                reasons.append(str(error))
            else:
                write_json(folder / "text.json", {"used": used, "documents": documents})
                return
        raise _UnavailableError("; ".join(reasons))

    kept = read_json(cached_folder("hub", key, write) / "text.json")
    return kept["documents"], kept["used"]


def _from_mirror(wanted: _Wanted) -> tuple[list[str], str]:
    folder = Path(wanted.mirror or "")
    if not folder.is_dir():
        raise _UnavailableError(f"the mirror: no folder {folder}")
    try:
        return _of_folder(folder, wanted), "mirror"
    except _UnavailableError as error:
        # A folder that was named and is there is what is meant: that it cannot be read is not passed over.
        raise ConfigError(
            "mirror",
            f"cannot be read as a data set: {error}",
            value=wanted.mirror,
            accepted="the files of the data set's repository: README.md with its configs, data/*.parquet, *.jsonl.gz, …",
        ) from error


def _from_network(wanted: _Wanted) -> tuple[list[str], str]:
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        raise _UnavailableError("the network: HF_HUB_OFFLINE is set")
    try:
        # `datasets` alone would try for half a minute to reach a hub that is not there.
        commit = HfApi().dataset_info(wanted.dataset, revision=wanted.revision, timeout=CONNECT_SECONDS).sha
    except RevisionNotFoundError as error:
        raise ConfigError("revision", "the hub has no such revision", value=wanted.revision) from error
    except RepositoryNotFoundError as error:
        if "gated" in type(error).__name__.lower():
            raise _UnavailableError(_gated(wanted)) from error
        raise ConfigError(
            "dataset", "the hub has no such data set, or it is private", value=wanted.dataset,
            hint="if it is private, log in with 'hf auth login'",
        ) from error  # fmt: skip
    except Exception as error:  # The HTTP library's errors have no base of their own that stays the same.
        raise _UnavailableError(f"the network: {_reason(error)}") from error

    def stream() -> Rows:
        rows: Rows = datasets.load_dataset(
            wanted.dataset, wanted.config, split=wanted.data_split, revision=commit, streaming=True
        )
        return rows

    return _documents(stream, wanted, "the network"), f"hub {wanted.dataset}@{commit}"


def _from_datasets_cache(wanted: _Wanted) -> tuple[list[str], str]:
    """What `datasets.load_dataset` prepared on this machine."""
    from datasets.packaged_modules.cache.cache import Cache

    place = "the cache of `datasets`"
    _quiet()
    try:
        builder = Cache(
            repo_id=wanted.dataset,
            dataset_name=wanted.dataset.rpartition("/")[2],
            config_name=wanted.config,
            version="auto",
            hash="auto",
        )
    except ValueError as error:
        raise _UnavailableError(f"{place}: {_reason(error)}") from error
    if re.fullmatch("[0-9a-f]{40}", wanted.revision) and builder.hash != wanted.revision:
        raise _UnavailableError(f"{place}: another revision, {builder.hash}")
    documents = _documents(lambda: builder.as_streaming_dataset(split=wanted.data_split), wanted, place)
    return documents, f"hub {wanted.dataset}@{builder.hash}"


def _from_hub_cache(wanted: _Wanted) -> tuple[list[str], str]:
    """What `hf download --repo-type dataset` brought to this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                wanted.dataset, repo_type="dataset", revision=wanted.revision, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, ValueError) as error:
        raise _UnavailableError("the hub's cache: not there") from error
    try:
        return _of_folder(folder, wanted), f"hub {wanted.dataset}@{folder.name}"
    except _UnavailableError as error:
        raise _UnavailableError(f"the hub's cache: {error}") from error


def _of_folder(folder: Path, wanted: _Wanted) -> list[str]:
    import datasets

    def stream(config: str | None, **more: Any) -> Rows:
        rows: Rows = datasets.load_dataset(
            str(folder), config, split=wanted.data_split, streaming=True, **more
        )
        return rows

    # `datasets` wants the files of every config and split; a copy of those that are asked for is enough.
    declared = _declared_files(folder, wanted)
    if declared:
        files = {wanted.data_split: declared}
        return _documents(lambda: stream(None, data_files=files), wanted, str(folder))
    # Without the configs of a README a config is what its folder holds.
    if wanted.config is not None and not (folder / "README.md").is_file():
        inside = wanted.config if (folder / wanted.config).is_dir() else "."
        return _documents(lambda: stream(None, data_dir=inside), wanted, str(folder))
    return _documents(lambda: stream(wanted.config), wanted, str(folder))


def _declared_files(folder: Path, wanted: _Wanted) -> list[str]:
    """The patterns that README.md declares for the config and split; none where it says nothing of them."""
    from huggingface_hub import DatasetCard

    if wanted.config is None or not (folder / "README.md").is_file():
        return []
    configs = (
        DatasetCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict().get("configs")
    )
    found: list[str] = []
    for config in configs if isinstance(configs, list) else []:
        entries = config.get("data_files") if config.get("config_name") == wanted.config else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("split") == wanted.data_split:
                paths = entry.get("path") or []
                found += [paths] if isinstance(paths, str) else list(paths)
    return found


def _documents(stream: Callable[[], Rows], wanted: _Wanted, place: str) -> list[str]:
    """The first documents with text; ConfigError for what is wrong in the config, else _UnavailableError."""
    _quiet()
    try:
        texts = _texts(stream(), wanted)
        made = _articles(texts) if wanted.join == "articles" else texts
        return list(islice((text for text in made if text.strip()), wanted.num_documents))
    except ConfigError:
        raise
    except Exception as error:  # What `datasets` raises depends on the format and the file system.
        message = str(error)
        if isinstance(error, ValueError) and message.startswith(("BuilderConfig", "Config name")):
            raise ConfigError("config", _reason(error), value=wanted.config) from error
        if isinstance(error, ValueError) and message.startswith(("Bad split", "Unknown split")):
            raise ConfigError("data_split", _reason(error), value=wanted.data_split) from error
        if "scripts are no longer supported" in message:
            raise ConfigError(
                "dataset", "this data set is a script, which is not run", value=wanted.dataset,
                hint="revision=refs/convert/parquet, where the hub converted it",
            ) from error  # fmt: skip
        if "gated" in message:
            raise _UnavailableError(_gated(wanted)) from error
        packing = "zstd" in message.lower() or "zstandard" in message.lower()
        advice = "; its files are packed with Zstandard: pip install zstandard" if packing else ""
        raise _UnavailableError(f"{place}: {_reason(error)}{advice}") from error


def _texts(rows: Rows, wanted: _Wanted) -> Iterator[str]:
    for row in rows:
        if wanted.text_field not in row:
            raise no_such_column(
                "text_field", "no such column", wanted.text_field, row, f"'{wanted.text_field}' of {wanted.dataset}"
            )  # fmt: skip
        value = row[wanted.text_field]
        if value is not None and not isinstance(value, str):
            raise ConfigError(
                "text_field", f"this column is no text but {type(value).__name__}", value=wanted.text_field
            )
        yield value or ""


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Lines put together to articles, each beginning with its heading '= Title ='."""
    held: list[str] = []
    for line in lines:
        if held and HEADING.fullmatch(line):
            yield "".join(held)
            held = []
        held.append(line if line.endswith("\n") else f"{line}\n")
    yield "".join(held)


def _gated(wanted: _Wanted) -> str:
    return (
        f"the hub: {wanted.dataset} is gated: accept its licence at https://huggingface.co/datasets/{wanted.dataset} "
        "and log in with 'hf auth login'"
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _quiet() -> None:
    import datasets

    # What it logs as an error it raises as well.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
