"""Which tasks of the evaluation harness a name stands for, checked before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lm_eval.tasks._index import Entry

from reprune.errors import ConfigError, nearest
from reprune.evaluation.harness import task_config, undisturbed
from reprune.evaluation.harness_catalogue import Catalogue, children


@dataclass(frozen=True)
class Tasks:
    """Entries as they were found: the tasks of each, and of every task its identity and number of documents."""

    catalogue: Catalogue
    members: Mapping[str, list[str]]
    identities: Mapping[str, dict[str, Any]]
    num_documents: Mapping[str, int]


def resolve(names: Sequence[str], include_path: str | None, num_fewshot: int | None) -> Tasks:
    """Find, load and fingerprint tasks, groups and tags.

    Task files below `include_path` come first; the harness's own tasks are looked at only for names that are not
    there, since listing them takes seconds. Raises ConfigError (keys `include_path`, `tasks`, `num_fewshot`).
    """
    catalogue = _catalogue(names, include_path)
    members: dict[str, list[str]] = {}
    identities: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        loaded = _load(catalogue, name)
        members[name] = list(loaded)
        for task_name, task in loaded.items():
            if task_name in identities:
                owner = next(entry for entry in members if task_name in members[entry])
                raise ConfigError(
                    "tasks", f"'{task_name}' is part of '{owner}' and of '{name}'", hint="name one of them"
                )
            shots = _shots(task, task_name, num_fewshot)
            documents = task.eval_docs
            identities[task_name] = {
                "config": {**task_config(task), "num_fewshot": shots},
                "documents": _content(documents),
                **({"shots": _content(task.fewshot_docs())} if shots else {}),
            }
            sizes[task_name] = len(documents)
    return Tasks(catalogue, members, identities, sizes)


def _catalogue(names: Sequence[str], include_path: str | None) -> Catalogue:
    with undisturbed():
        if include_path is None:
            catalogue = Catalogue(None, include_defaults=True)
        else:
            folder = _folder(include_path)
            catalogue = Catalogue(folder, include_defaults=False)
            if not catalogue.task_index:
                raise ConfigError(
                    "include_path",
                    "no task file is in this folder",
                    value=folder,
                    accepted="a folder of task YAMLs as the harness reads them ('task: NAME')",
                )
            if not all(_complete(name, catalogue.task_index) for name in names):
                catalogue = Catalogue(folder, include_defaults=True)
    unknown = [name for name in names if name not in catalogue.task_index]
    if unknown:
        raise _unknown(unknown[0], names, catalogue, include_path)
    return catalogue


def _folder(include_path: str) -> Path:
    folder = Path(include_path).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            "include_path",
            "is a file, not a folder" if folder.exists() else "there is no such folder",
            value=folder,
            accepted="a folder of task YAMLs",
            hint=f"include_path={folder.parent}" if folder.is_file() else None,
        )
    return folder


def _complete(name: str, index: Mapping[str, Entry]) -> bool:
    """Whether a name and all that its group refers to by name are in the index."""
    entry = index.get(name)
    if entry is None:
        return False
    return all(_complete(child, index) for child in children(entry))


def _unknown(name: str, names: Sequence[str], catalogue: Catalogue, include_path: str | None) -> ConfigError:
    meant = nearest(name, catalogue.task_index)
    ours: list[str] = []
    if include_path is not None:
        ours = sorted(Catalogue(_folder(include_path), include_defaults=False).task_index)
    within = f"{', '.join(ours)} (in include_path); " if ours else ""
    return ConfigError(
        "tasks",
        f"no task, group or tag is called '{name}'",
        value=", ".join(names),
        accepted=f"{within}any of the harness's, see `lm-eval ls tasks`",
        hint=f"did you mean '{meant}'?" if meant else None,
    )


def _load(catalogue: Catalogue, name: str) -> dict[str, Any]:
    """The task objects of an entry, their datasets loaded."""
    for entry in catalogue.below(name):
        gone = catalogue.missing_files(entry)
        if gone:
            raise ConfigError(
                "tasks",
                f"the data of '{entry.name}' is not there",
                value=", ".join(gone),
                accepted="data_files relative to the task's file, or absolute",
            )
    with undisturbed():
        try:
            return dict(catalogue.load([name])["tasks"])
        except Exception as error:
            # The harness, datasets and whatever a task file imports: nothing but this is common to what they raise.
            raise _not_loaded(name, catalogue.task_index, error) from error


def _not_loaded(name: str, index: Mapping[str, Entry], error: Exception) -> ConfigError:
    config = index[name].cfg or {}
    source = " ".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
    return ConfigError(
        "tasks",
        f"'{name}' cannot be loaded: {in_a_line(error)}",
        value=f"{name} (dataset {source})" if source else name,
        hint="where the hub cannot be reached: include_path=FOLDER with a task file on local data",
    )


def in_a_line(error: Exception) -> str:
    """What an error is and the first line of what it says."""
    lines = str(error).strip().splitlines() or ["no more is said"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _shots(task: Any, name: str, num_fewshot: int | None) -> int:
    """How many worked examples the harness will put before a question."""
    own = task.get_config("num_fewshot")
    if num_fewshot and own == 0:
        # The harness would leave it at 0 without a word.
        raise ConfigError(
            "num_fewshot", f"the task file of '{name}' fixes it at 0", value=num_fewshot, accepted="null or 0"
        )
    return int((own if num_fewshot is None else num_fewshot) or 0)


def _content(documents: Iterable[Any]) -> str:
    """sha256 over documents as JSON, a line each."""
    digest = sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
