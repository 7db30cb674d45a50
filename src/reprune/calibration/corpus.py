"""Texts that are there: the package-index texts and the user's files, as lists of documents."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from reprune.errors import ConfigError, did_you_mean
from reprune.model.assets import TEXTS

BUILTIN_FILES = {
    "web": "c4.utf8",
    "wiki": "wiki.utf8",
    "technical": "technical.utf8",
    "code": "code.utf8",
    "stories": "tiny.utf8",
}
SECTION_CHARACTERS = 4000


@dataclass(frozen=True)
class Corpus:
    """The documents of one text, duplicates removed, with a hash of its content."""

    name: str
    documents: tuple[str, ...]
    sha256: str
    builtin: bool


@lru_cache(maxsize=8)
def builtin_corpus(name: str, key: str) -> Corpus:
    """One of the package-index texts; `key` is the config key an error names."""
    text = (TEXTS.require(key) / BUILTIN_FILES[name]).read_text(encoding="utf-8")
    if name == "web":
        documents = text.split("\n")
    elif name == "wiki":
        documents = re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, re.DOTALL)
    elif name == "stories":
        documents = text.split("<|endoftext|>")
    else:
        documents = sections(text)
    return _corpus(name, documents, text.encode(), builtin=True)


def corpus_at(place: str, key: str, text_field: str = "text") -> Corpus:
    """A package-index text by its name, or the user's text at a path; `key` is the config key an error names."""
    return builtin_corpus(place, key) if place in BUILTIN_FILES else file_corpus(place, key, text_field)


def file_corpus(path: str, key: str, text_field: str = "text") -> Corpus:
    """A text file (sections at blank lines), a JSONL file (its `text_field`), or a folder of text files.

    Raises ConfigError, naming `key`, for what is missing, empty, not UTF-8 or without the field.
    """
    place = Path(path)
    if not place.exists():
        accepted = [*BUILTIN_FILES, "a text file", "a .jsonl file", "a folder"]
        raise ConfigError(
            key, "no such text", value=path, accepted=accepted, hint=did_you_mean(path, BUILTIN_FILES)
        )
    if place.is_dir():
        files = sorted(
            file for file in place.rglob("*") if file.is_file() and file.suffix in {".txt", ".md", ".utf8"}
        )
        if not files:
            raise ConfigError(
                key, "this folder has no text files", value=path, accepted="*.txt, *.md, *.utf8"
            )
        documents = [_decode(file.read_bytes(), file, key) for file in files]
    else:
        text = _decode(place.read_bytes(), place, key)
        documents = _jsonl(text, place, key, text_field) if place.suffix == ".jsonl" else sections(text)
    # By what was read, not by the file: another field of a JSONL file is another text.
    corpus = _corpus(place.stem, documents, "\0".join(documents).encode(), builtin=False)
    if not corpus.documents:
        raise ConfigError(key, "this text is empty", value=path)
    return corpus


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


def _jsonl(text: str, path: Path, key: str, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(key, f"line {number} is not JSON: {error.msg}", value=path) from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            there = list(row) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(
                key, f"line {number} has no text in the field '{field}'", value=path, accepted=there
            )
        documents.append(row[field])
    return documents


def _decode(raw: bytes, path: Path, key: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            key,
            f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}",
            value=path,
            hint=f"convert it, e.g. iconv -f latin1 -t utf-8 '{path}'",
        ) from error


def _corpus(name: str, documents: list[str], content: bytes, builtin: bool) -> Corpus:
    unique = dict.fromkeys(stripped for document in documents if (stripped := document.strip()))
    return Corpus(name, tuple(unique), hashlib.sha256(content).hexdigest(), builtin)
