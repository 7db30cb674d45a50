"""The one content-addressed cache: what is expensive and depends only on its key is made once."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from reprune.files import flush_to_disk, sha256_of_json, write_json


def cache_root() -> Path:
    """`$REPRUNE_CACHE`, else `~/.cache/reprune`."""
    return Path(os.environ.get("REPRUNE_CACHE", Path.home() / ".cache" / "reprune"))


def cached_folder(kind: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder that holds what `make` writes for `key`; made at most once, also by several processes.

    `make` fills a temporary folder that is renamed into place when it is complete, so a killed writer
    leaves nothing that is read.
    """
    root = cache_root() / kind
    folder = root / sha256_of_json(dict(key))[:32]
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        # What killed writers left; nobody else writes this while the lock is held.
        for left in root.glob(f".{folder.name}.*.part"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = root / f".{folder.name}.{uuid.uuid4().hex}.part"
        temporary.mkdir()
        try:
            make(temporary)
            write_json(temporary / "key.json", dict(key))
            for path in temporary.rglob("*"):
                flush_to_disk(path)
            os.replace(temporary, folder)
            flush_to_disk(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder
