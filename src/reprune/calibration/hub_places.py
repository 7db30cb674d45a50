"""Where a data set of the hub can be had: a mirror, the network, the cache of `datasets`, the hub's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from reprune.calibration.formats import no_such_column
from reprune.errors import ConfigError

CONNECT_SECONDS = 10
PASSAGE = 100
HEADING = re.compile(r"\s*= (?!=).*(?<!=) =\s*")

Join = Literal["rows", "articles", "passages"]
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Wanted:
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


class UnavailableError(Exception):
    """A place that does not have the text; the message says which and why."""


def from_mirror(wanted: Wanted) -> tuple[list[str], str]:
    """Documents of the mirror, and 'mirror'. UnavailableError without a folder; ConfigError for one that is no data set."""
    folder = Path(wanted.mirror or "")
    if not folder.is_dir():
        raise UnavailableError(f"the mirror: no folder {folder}")
    try:
        return _of_folder(folder, wanted), "mirror"
    except UnavailableError as error:
        # A folder that was named and is there is what is meant: that it cannot be read is not passed over.
        raise ConfigError(
            "mirror",
            f"cannot be read as a data set: {error}",
            value=wanted.mirror,
            accepted="the files of the data set's repository: README.md with its configs, data/*.parquet, *.jsonl.gz, …",
        ) from error


def from_network(wanted: Wanted) -> tuple[list[str], str]:
    """The head of the stream, and 'hub NAME@COMMIT'. UnavailableError when the hub cannot be reached."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        raise UnavailableError("the network: HF_HUB_OFFLINE is set")
    try:
        # `datasets` alone would try for half a minute to reach a hub that is not there.
        commit = HfApi().dataset_info(wanted.dataset, revision=wanted.revision, timeout=CONNECT_SECONDS).sha
    except RevisionNotFoundError as error:
        raise ConfigError("revision", "the hub has no such revision", value=wanted.revision) from error
    except RepositoryNotFoundError as error:
        if "gated" in type(error).__name__.lower():
            raise UnavailableError(_gated(wanted)) from error
        raise ConfigError(
            "dataset", "the hub has no such data set, or it is private", value=wanted.dataset,
            hint="if it is private, log in with 'hf auth login'",
        ) from error  # fmt: skip
    except Exception as error:  # The HTTP library's errors have no base of their own that stays the same.
        raise UnavailableError(f"the network: {_reason(error)}") from error

    def stream() -> Rows:
        rows: Rows = datasets.load_dataset(
            wanted.dataset, wanted.config, split=wanted.data_split, revision=commit, streaming=True
        )
        return rows

    return _documents(stream, wanted, "the network"), f"hub {wanted.dataset}@{commit}"


def from_datasets_cache(wanted: Wanted) -> tuple[list[str], str]:
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
        raise UnavailableError(f"{place}: {_reason(error)}") from error
    if re.fullmatch("[0-9a-f]{40}", wanted.revision) and builder.hash != wanted.revision:
        raise UnavailableError(f"{place}: another revision, {builder.hash}")
    documents = _documents(lambda: builder.as_streaming_dataset(split=wanted.data_split), wanted, place)
    return documents, f"hub {wanted.dataset}@{builder.hash}"


def from_hub_cache(wanted: Wanted) -> tuple[list[str], str]:
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
        raise UnavailableError("the hub's cache: not there") from error
    try:
        return _of_folder(folder, wanted), f"hub {wanted.dataset}@{folder.name}"
    except UnavailableError as error:
        raise UnavailableError(f"the hub's cache: {error}") from error


def _of_folder(folder: Path, wanted: Wanted) -> list[str]:
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


def _declared_files(folder: Path, wanted: Wanted) -> list[str]:
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


def _documents(stream: Callable[[], Rows], wanted: Wanted, place: str) -> list[str]:
    """The first documents with text; ConfigError for what is wrong in the config, else UnavailableError."""
    _quiet()
    try:
        texts = _texts(stream(), wanted)
        made = JOINS[wanted.join](texts)
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
            raise UnavailableError(_gated(wanted)) from error
        packing = "zstd" in message.lower() or "zstandard" in message.lower()
        advice = "; its files are packed with Zstandard: pip install zstandard" if packing else ""
        raise UnavailableError(f"{place}: {_reason(error)}{advice}") from error


def _texts(rows: Rows, wanted: Wanted) -> Iterator[str]:
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


def _passages(sentences: Iterable[str]) -> Iterator[str]:
    """Sentences put together by a space, PASSAGE of them at a time."""
    left = iter(sentences)
    while passage := list(islice(left, PASSAGE)):
        yield " ".join(passage)


JOINS: dict[Join, Callable[[Iterable[str]], Iterable[str]]] = {
    "rows": iter,
    "articles": _articles,
    "passages": _passages,
}


def _gated(wanted: Wanted) -> str:
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
