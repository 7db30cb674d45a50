"""Files of text: plain text, JSON lines and Parquet, as they are or packed with gzip or Zstandard."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from reprune.errors import ConfigError, did_you_mean

Errors = Literal["strict", "replace"]

PLAIN = (".txt", ".md", ".utf8")
ROWS = (".jsonl", ".json", ".parquet")
PACKED = (".gz", ".zst")
ACCEPTED = "*.txt, *.md, *.utf8, *.jsonl, *.json (each also as .gz or .zst), *.parquet"
SECTION_CHARACTERS = 4000


def name_of(path: Path) -> str:
    """The file's name without its endings: 'mine' for mine.jsonl.gz."""
    name = path.name
    for endings in (PACKED, (*PLAIN, *ROWS)):
        name = name.removesuffix(Path(name).suffix) if Path(name).suffix in endings else name
    return name if name != path.name else path.stem


def readable(path: Path) -> bool:
    """Whether a folder's file is read as text. Plain .json is left out: beside a text it is settings."""
    kind, packed = _kind(path)
    return kind in (*PLAIN, ".jsonl") or (kind == ".json" and packed != "") or path.suffix == ".parquet"


def documents_in(path: Path, key: str, text_field: str, errors: Errors, whole: bool) -> list[str]:
    """The documents of one file: rows of JSON and Parquet, of a text its sections, or all of it if `whole`.

    Raises ConfigError, naming `key`, for what is damaged, not UTF-8 (unless `errors` is 'replace') or without the field.
    """
    kind, packed = _kind(path)
    if path.suffix == ".parquet":
        return _parquet(path, key, text_field)
    text = _decoded(_unpacked(path, packed, key), path, packed, key, errors)
    if kind in (".jsonl", ".json"):
        return _json(text, path, key, text_field)
    return [text] if whole else sections(text)


def sections(text: str) -> list[str]:
    """Cut a text without document marks at blank lines into sections of at least 4,000 characters."""
    found: list[str] = []
    current = ""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        current += paragraph + "\n\n"
        if len(current) >= SECTION_CHARACTERS:
            found.append(current)
            current = ""
    return [*found, current]


def no_such_column(key: str, problem: str, field: str, there: Iterable[Any], place: object) -> ConfigError:
    """The error for rows without the text field: what there is instead."""
    names = [str(name) for name in there]
    hint = did_you_mean(field, names)
    return ConfigError(key, problem, value=place, accepted=names or "nothing", hint=hint)


def _kind(path: Path) -> tuple[str, str]:
    packed = path.suffix if path.suffix in PACKED else ""
    return Path(path.name.removesuffix(packed)).suffix, packed


def _unpacked(path: Path, packed: str, key: str) -> bytes:
    try:
        if packed == ".gz":
            return gzip.decompress(path.read_bytes())
        if packed == ".zst":
            # Python 3.11 has no Zstandard; pyarrow, which comes with datasets, has.
            import pyarrow  # type: ignore[import-untyped]

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                return bytes(stream.read())
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        if not packed:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(key, f"cannot be read: {reason}", value=path) from error
        raise ConfigError(
            key, f"not a whole {packed} file: {error}", value=path, hint="copy or download it again"
        ) from error


def _decoded(raw: bytes, path: Path, packed: str, key: str, errors: Errors) -> str:
    try:
        return raw.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        where = f"offset {error.start}" + (" of what is packed in it" if packed else "")
        # Only a source has the key; the texts of an evaluator are named by their path alone.
        source, is_source = key.removesuffix(".domain"), key.endswith(".domain")
        or_replace = f", or {source}.errors=replace for U+FFFD in its place" if is_source else ""
        raise ConfigError(
            key,
            f"not UTF-8: byte 0x{raw[error.start]:02x} at {where}",
            value=path,
            hint=f"convert it, e.g. iconv -f latin1 -t utf-8 '{path}'{or_replace}",
        ) from error


def _json(text: str, path: Path, key: str, field: str) -> list[str]:
    """The field of every row: a list of objects, or an object a line. Only line feeds end a line of JSON."""
    text = text.removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        try:
            rows = [(f"item {number}", row) for number, row in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise ConfigError(key, f"line {error.lineno} is not JSON: {error.msg}", value=path) from error
        return [_field(row, where, path, key, field) for where, row in rows]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(key, f"line {number} is not JSON: {error.msg}", value=path) from error
        documents.append(_field(row, f"line {number}", path, key, field))
    return documents


def _field(row: Any, where: str, path: Path, key: str, field: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    there = row if isinstance(row, dict) else [type(row).__name__]
    raise no_such_column(key, f"{where} has no text in the field '{field}'", field, there, path)


def _parquet(path: Path, key: str, field: str) -> list[str]:
    """The column's strings; rows without a value have no text."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise no_such_column(key, f"no column '{field}' in this file", field, schema.names, path)
            kind = schema.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                columns = [column.name for column in schema if pyarrow.types.is_string(column.type)]
                raise no_such_column(key, f"the column '{field}' is no text but {kind}", field, columns, path)
            values = file.read(columns=[field]).column(field).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(key, f"not a whole Parquet file: {reason}", value=path) from error
    return [value for value in values if value is not None]
