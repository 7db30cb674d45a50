"""Find out what lies at a path that masks are taken from: a file, the folder of a run, a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from reprune.engine.state import OPEN, RunState
from reprune.errors import ConfigError
from reprune.files import read_json
from reprune.model.checkpoint import weight_files
from reprune.pruning.mask_files import ACCEPTED, KEY, Checkpoint, MaskFile, MaskSource, RunMasks, opened
from reprune.run_folder import RunFolder


def open_source(path: Path) -> MaskSource:
    """Find out what lies at `path`. Raises ConfigError for what is no source of masks, unfinished or damaged."""
    _refuse_renumbered(path)
    if path.is_file():
        return MaskFile(path, _table([path], path))
    if not path.is_dir():
        raise ConfigError(KEY, "no such file or folder", value=path, accepted=ACCEPTED)
    is_run = any((path / name).is_file() for name in ("status.json", "result.json", f"state/{OPEN}"))
    if is_run and not RunFolder(path).finished:
        raise ConfigError(
            KEY,
            "this run has not finished",
            value=path,
            accepted=ACCEPTED,
            hint="give the command that began it again: it goes on where it stopped",
        )
    for file in (path / "masks" / "masks.safetensors", path / "masks.safetensors"):
        if file.is_file():
            return MaskFile(path, _table([file], path))
    if is_run:
        return RunMasks(path, _table(_state_files(path), path))
    if (path / "config.json").is_file():
        return Checkpoint(path, _table(_weights(path), path))
    raise ConfigError(
        KEY, "neither masks, nor a run, nor a checkpoint lies there", value=path, accepted=ACCEPTED
    )


def _refuse_renumbered(path: Path) -> None:
    """ConfigError for a run in which blocks were dropped, and for the masks that it wrote."""
    path = path.absolute()
    for folder in (path, *(above.parent for above in (path, path.parent) if above.name == "masks")):
        record = folder / "transform.json"
        if record.is_file() and "dropped" in read_json(record):
            raise ConfigError(
                KEY, "blocks were dropped in this run, and its masks are by the numbers of those that stayed", value=path,
                accepted=ACCEPTED, hint="evaluate or prune its exported model",
            )  # fmt: skip


def _state_files(run: Path) -> list[Path]:
    state = run / "state"
    try:
        windows = RunState(state).windows_done()
    except (SafetensorError, KeyError, TypeError) as error:
        raise ConfigError(KEY, f"{OPEN} of its state is damaged: {error}", value=run) from error
    files = [state / f"frozen_{number:04d}.safetensors" for number in range(1, windows + 1)]
    if not windows:
        raise ConfigError(KEY, "this run has neither masks/ nor state/", value=run, accepted=ACCEPTED)
    return [file for file in [*files, state / OPEN] if file.is_file()]


def _weights(checkpoint: Path) -> tuple[Path, ...]:
    try:
        files = weight_files(checkpoint, KEY, allow_bin=True)
    except (json.JSONDecodeError, KeyError) as error:
        raise ConfigError(KEY, f"the index of its weights is damaged: {error}", value=checkpoint) from error
    if files.pickled:
        raise ConfigError(
            KEY,
            f"this checkpoint has pickled weights only ({files.paths[0].name}), which can run code when they are read",
            value=checkpoint,
            accepted="model*.safetensors",
            hint="save it with save_pretrained()",
        )
    return files.paths


def _table(files: Sequence[Path], path: Path) -> dict[str, Path]:
    found = {}
    for file in files:
        with opened(file, path) as stream:
            found.update(dict.fromkeys(stream.keys(), file))
    return found
