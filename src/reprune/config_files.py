"""The tree of config files: where it is, which options a group has, which file sets a key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from reprune.errors import ConfigError, did_you_mean


def config_root() -> Path:
    """The folder with conf/, experiments/ and sweeps/: inside the installed package, or the checkout's top."""
    package = Path(__file__).resolve().parent
    return package if (package / "conf").is_dir() else package.parents[1]


def options_of(group: str) -> list[str]:
    """The names of a group's options; none for what is no group."""
    return list(option_files(group))


def option_files(group: str) -> dict[str, Path]:
    """By name, the files of a group's options, in its folder and below: there only deltas on the whole config.

    W&B's own files and lists of claims lie there too, and are no options.
    """
    for base in (config_root() / "conf" / group, config_root() / group):
        if base.is_dir():
            # A folder of experiments may be named as a group: `experiments=methods/NAME`.
            deltas = group.startswith("experiments")
            files = {path.relative_to(base).with_suffix("").as_posix(): path for path in base.rglob("*.yaml")}
            return {
                name: files[name]
                for name in sorted(files)
                if (files[name].parent == base and not deltas) or _is_global(files[name])
            }
    return {}


def _is_global(path: Path) -> bool:
    return path.read_text(encoding="utf-8").startswith("# @package _global_")


def published_tables() -> dict[str, Path]:
    """By name, the tables that `published=NAME` may name: CSV files in experiments/published."""
    return {path.stem: path for path in sorted((config_root() / "experiments" / "published").glob("*.csv"))}


def check_published(name: str | None) -> None:
    """Refuse, with a ConfigError, a published table that is not there."""
    tables = published_tables()
    if name is not None and name not in tables:
        raise ConfigError(
            "published", "no such table in experiments/published", value=name, accepted=list(tables),
            hint=did_you_mean(name, tables),
        )  # fmt: skip


def files_with(key: str, overrides: Sequence[str] | None = None) -> str:
    """' (in FILE)' for a method, experiment or arm file that sets the dotted key, else nothing; of those `overrides` name."""
    for group in ("method", "experiments", "arm", "sweeps"):
        named = {
            name
            for item in overrides or ()
            for name in item.lstrip("+").removeprefix(f"{group}=").split(",")
            if item.lstrip("+").startswith(f"{group}=")
        }
        for name, path in option_files(group).items():
            if overrides is not None and name not in named:
                continue
            node: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            for part in key.split("."):
                node = node.get(part, None) if isinstance(node, dict) else None
            if node is not None:
                return f" (in {path.relative_to(config_root())})"
    return ""
