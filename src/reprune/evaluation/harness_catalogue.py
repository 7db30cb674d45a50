"""Task files of the evaluation harness: what a name stands for, and where its data lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

FILE_FORMATS = ("json", "csv", "parquet", "text")
"""Dataset paths that stand for files of this format, not for a set of the hub."""


class Catalogue(TaskManager):  # type: ignore[misc]
    """The harness's task manager, which looks for data files beside the task file that names them.

    The harness itself looks in the folder that it was started from. `loaded` is what was loaded last.
    """

    loaded: Mapping[str, Any]

    def __init__(self, include_path: Path | None, include_defaults: bool) -> None:
        super().__init__(include_path=include_path, include_defaults=include_defaults)
        self._own = include_path

    def load(self, task_list: Any) -> Any:
        """Load as the harness does; the task objects stay in `loaded`."""
        for name in task_list:
            for entry in self.below(name):
                local = self._local(entry)
                if local is not None and entry.yaml_path is not None:
                    functions = load_yaml(entry.yaml_path, resolve_func=True)
                    entry.cfg, entry.yaml_path = {**functions, **local}, None
        self.loaded = super().load(task_list)
        return self.loaded

    def below(self, name: str) -> list[Entry]:
        """An entry and all that it refers to; what a group defines in its own file is in no index."""
        entry: Entry = self.task_index[name]
        below = [self.below(child) for child in children(entry) if child in self.task_index]
        return [entry, *(it for entries in below for it in entries)]

    def missing_files(self, entry: Entry) -> list[str]:
        """Of the files that a task names, those that are not there, and patterns that match none."""
        config = {**(entry.cfg or {}), **(self._local(entry) or {})}
        return _missing_files(config)

    def _local(self, entry: Entry) -> dict[str, Any] | None:
        """What makes the paths of a task of `include_path` absolute; None where there are none, or they are already."""
        if self._own is None or entry.kind is not Kind.TASK or entry.yaml_path is None:
            return None
        if not entry.yaml_path.is_relative_to(self._own):
            return None
        return _with_absolute_paths(entry.cfg or {}, entry.yaml_path.parent)


def children(entry: Entry) -> list[str]:
    """The names that a group or tag refers to."""
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task") if entry.kind is Kind.GROUP else None
    named = [
        child.get("group", child.get("task")) if isinstance(child, Mapping) else child
        for child in listed or []
    ]
    return [name for name in named if isinstance(name, str)]


def _with_absolute_paths(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The keys of a task config that name files, relative to `folder` made absolute; None where there are none."""
    given = dict(config.get("dataset_kwargs") or {})
    if config.get("dataset_path") not in FILE_FORMATS or not {"data_files", "data_dir"} & set(given):
        return None

    def absolute(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: absolute(item) for name, item in value.items()}
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return str(value) if "://" in str(value) else str(folder / str(value))

    if "data_dir" in given:
        # Files are looked for in their folder, so only the folder is relative to the task's file.
        given["data_dir"] = absolute(given["data_dir"])
    else:
        given["data_files"] = absolute(given["data_files"])
    return {"dataset_kwargs": given}


def _missing_files(config: Mapping[str, Any]) -> list[str]:
    """Of the files that a task config names by absolute path, those that are not there; patterns that match none."""
    named: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, Mapping | list):
            for item in value.values() if isinstance(value, Mapping) else value:
                collect(item)
        elif "://" not in str(value):
            named.append(str(value))

    given = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") in FILE_FORMATS:
        collect(given.get("data_dir", given.get("data_files", [])))
    return [name for name in named if not _matches(Path(name))]


def _matches(path: Path) -> bool:
    if path.exists():
        return True
    return any(letter in str(path) for letter in "*?[") and any(
        Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    )
