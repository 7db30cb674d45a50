"""Texts that are there: the package-index texts and the user's files, as lists of documents."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from reprune.calibration.formats import ACCEPTED, Errors, documents_in, name_of, readable, sections
from reprune.errors import ConfigError, did_you_mean
from reprune.model.assets import TEXTS

BUILTIN_FILES = {
    "web": "c4.utf8",
    "wiki": "wiki.utf8",
    "technical": "technical.utf8",
    "code": "code.utf8",
    "stories": "tiny.utf8",
}


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


def corpus_at(place: str, key: str, text_field: str = "text", errors: Errors = "strict") -> Corpus:
    """A package-index text by its name, or the user's text at a path; `key` is the config key an error names."""
    if place in BUILTIN_FILES:
        return builtin_corpus(place, key)
    return file_corpus(place, key, text_field, errors)


def file_corpus(path: str, key: str, text_field: str = "text", errors: Errors = "strict") -> Corpus:
    """A text file (sections at blank lines), rows of JSON or Parquet (their `text_field`), or a folder of such files.

    A plain text in a folder is one document. `errors='replace'` puts U+FFFD where bytes are not UTF-8.
    Raises ConfigError, naming `key`, for what is missing, empty, damaged, not UTF-8 or without the field.
    """
    place = Path(path)
    if not place.exists():
        accepted = [*BUILTIN_FILES, "a file", f"a folder: {ACCEPTED}"]
        raise ConfigError(
            key, "no such text", value=path, accepted=accepted, hint=did_you_mean(path, BUILTIN_FILES)
        )
    files = [place]
    if place.is_dir():
        there = sorted(file for file in place.rglob("*") if file.is_file())
        files = [file for file in there if readable(file)]
        if not files:
            raise ConfigError(
                key, f"this folder has no text files, among {len(there)} files", value=path, accepted=ACCEPTED
            )
    documents = [
        document
        for file in files
        for document in documents_in(file, key, text_field, errors, whole=place.is_dir())
    ]
    # By what was read, not by the file: another field of a JSONL file is another text.
    name = place.name if place.is_dir() else name_of(place)
    corpus = corpus_of(name, documents)
    if not corpus.documents:
        size = sum(file.stat().st_size for file in files)
        counts = f"{len(files)} files, {size:,} bytes, {len(documents)} documents, none with text"
        raise ConfigError(key, "this text is empty", value=f"{path}: {counts}")
    return corpus


def corpus_of(name: str, documents: list[str]) -> Corpus:
    """Documents from outside the package, identified by what they say."""
    return _corpus(name, documents, "\0".join(documents).encode(), builtin=False)


def _corpus(name: str, documents: list[str], content: bytes, builtin: bool) -> Corpus:
    unique = dict.fromkeys(stripped for document in documents if (stripped := document.strip()))
    return Corpus(name, tuple(unique), hashlib.sha256(content).hexdigest(), builtin)
