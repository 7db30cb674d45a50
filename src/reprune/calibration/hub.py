"""Sources that are data sets of the Hugging Face hub: the first documents of a stream, from the network or offline."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from reprune.cache import cache_root, cached_folder
from reprune.calibration.corpora import CorpusSource
from reprune.calibration.corpus import BUILTIN_FILES, Corpus, builtin_corpus, corpus_of
from reprune.calibration.hub_places import (
    Join,
    UnavailableError,
    Wanted,
    from_datasets_cache,
    from_hub_cache,
    from_mirror,
    from_network,
)
from reprune.errors import ConfigError, require_option, require_positive
from reprune.files import read_json, write_json

LOG = logging.getLogger("reprune")


@dataclass(kw_only=True)
class HubText(CorpusSource):
    """The first `num_documents` documents of the stream that a data set's `config`, `data_split` and `revision` give.

    Nothing more is downloaded, and what was is kept in the project's cache, so that later runs need no network. `revision`
    should be a commit: a branch may move. `join=articles` puts rows together that are lines, an article for each heading
    '= Title ='; `join=passages` joins rows that are sentences by a space, a hundred at a time.

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
        wanted = Wanted(**{field.name: getattr(self, field.name) for field in fields(Wanted)})
        try:
            return _find(wanted, str(cache_root()), _state_of(wanted.mirror))
        except ConfigError as error:
            raise error.under(key) from error


@dataclass(frozen=True)
class Found:
    """A text and where it came from: 'hub NAME@COMMIT', 'mirror' or 'fallback TEXT'."""

    corpus: Corpus
    used: str


def _state_of(mirror: str | None) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of every file, so that a mirror that changed is read again."""
    if mirror is None:
        return ()
    files = sorted(path for path in Path(mirror).rglob("*") if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=16)
def _find(wanted: Wanted, root: str, state: object) -> Found:
    """Once a process, so that every role of a run sees one text; `root` and `state` are part of the question."""
    title = f"{wanted.dataset} {wanted.config or ''}".strip()
    try:
        documents, used = from_mirror(wanted) if wanted.mirror is not None else kept_or_streamed(wanted)
    except UnavailableError as error:
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


def kept_or_streamed(wanted: Wanted) -> tuple[list[str], str]:
    """The documents as an earlier run kept them, or else from where they can be had, and kept."""
    names = ("dataset", "config", "data_split", "revision", "text_field", "join", "num_documents")
    key = {name: getattr(wanted, name) for name in names}

    def write(folder: Path) -> None:
        reasons = []
        for place in (from_network, from_datasets_cache, from_hub_cache):
            try:
                documents, used = place(wanted)
            except UnavailableError as error:
                reasons.append(str(error))
            else:
                write_json(folder / "text.json", {"used": used, "documents": documents})
                return
        raise UnavailableError("; ".join(reasons))

    kept = read_json(cached_folder("hub", key, write) / "text.json")
    return kept["documents"], kept["used"]
