"""Compose configs the way Hydra will, and say what is wrong with them on one screen."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reprune import machine
from reprune.errors import ConfigError, did_you_mean
from reprune.schema import ExportConfig, RunConfig, SweepConfig, register

ROOT_VARIABLE = "REPRUNE_CONFIG_ROOT"
EXTRAS = {"ray": "ray", "submitit_slurm": "slurm", "submitit_local": "slurm"}
"""By launcher of Hydra's: the extra of this package that installs it."""


def config_root() -> Path:
    """The folder with conf/, experiments/ and sweeps/: inside the installed package, or the checkout's top."""
    package = Path(__file__).resolve().parent
    return package if (package / "conf").is_dir() else package.parents[1]


def prepare() -> Path:
    """Register schema and resolvers, tell the search path where experiments lie, and return the config folder."""
    register()
    machine.register()
    os.environ[ROOT_VARIABLE] = str(config_root())
    return config_root() / "conf"


@dataclass(frozen=True)
class Composed:
    """A run's config as plain data, its choices of options by group, and the overrides that led to it.

    `sweep` is what belongs to the whole sweep, and `hydra` its mode and grid: neither is recorded with the run.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: tuple[str, ...]
    hydra: dict[str, Any]
    sweep: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        config: Mapping[str, Any], choices: Mapping[Any, Any], overrides: Sequence[str], hydra: dict[str, Any]
    ) -> Composed:
        """Sort what Hydra composed: how a run is launched is told apart from what it is."""
        own = {key: value for key, value in config.items() if key != "sweep"}
        chosen = {str(group): str(option or "") for group, option in choices.items()}
        kept = {
            group: option
            for group, option in chosen.items()
            if group != "launcher" and not group.startswith("hydra/")
        }
        return Composed(own, kept, tuple(overrides), hydra, dict(config["sweep"]))

    @property
    def where(self) -> dict[str, str]:
        """By config key: the option file that filled it."""
        found = {}
        for group, option in self.choices.items():
            name, _, package = group.partition("@")
            if option:
                found[package or name] = f"conf/{name}/{option}.yaml"
        return found


def compose_run(overrides: Sequence[str]) -> Composed:
    """Compose one run. Raises ConfigError with the key, what is accepted and the nearest match."""
    folder = prepare()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3", job_name="reprune"):
            full = compose("config", overrides=list(overrides), return_hydra_config=True)
            choices = dict(full.hydra.runtime.choices)
            hydra = {
                "mode": str(full.hydra.mode or ""),
                "params": dict(full.hydra.sweeper.get("params") or {}),
            }
            config = plain(full)
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error, overrides) from error
    except ValueError as error:
        raise _number_as_option(error, overrides) from error
    finally:
        GlobalHydra.instance().clear()
    _check_keys(config, RunConfig, "", overrides)
    _check_emptied(config, overrides)
    _check_lists(overrides)
    _check_keys(config["export"], ExportConfig, "export.", overrides)
    _check_keys(config["sweep"], SweepConfig, "sweep.", overrides)
    return Composed.of(config, choices, overrides, hydra)


def _check_keys(node: Any, schema: type, prefix: str, overrides: Sequence[str]) -> None:
    """The schema's own check again: `+key=` and `~key` get past it."""
    accepted = [field.name for field in fields(schema)]
    for key in node:
        if key not in accepted:
            name = f"{prefix}{key}"
            raise ConfigError(
                name,
                f"unknown key{files_with(name)}",
                value=_value_in(name, overrides),
                accepted=accepted,
                hint=did_you_mean(key, accepted),
            )
    for key in accepted:
        if key not in node:
            raise ConfigError(f"{prefix}{key}", "has to be there", hint=f"leave out ~{prefix}{key}")


def _check_emptied(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """`key={}` adds nothing to what is there and takes nothing away, which is hardly what was meant."""
    for item in overrides:
        key, _, value = item.partition("=")
        node: Any = config
        for part in key.lstrip("+").split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if value.replace(" ", "") == "{}" and node:
            inside = [f"{key.lstrip('+')}.{name}=null" for name in node]
            raise ConfigError(
                key.lstrip("+"), "an empty mapping is merged into what is there and changes nothing", value="{}",
                accepted=f"values for {', '.join(node)}", hint=f"leave out what is there: {' '.join(inside)}",
            )  # fmt: skip


def _check_lists(overrides: Sequence[str]) -> None:
    """Of several options of a group, `group=[a,b]`, two that fill one key would be merged into one of neither kind."""
    for item in overrides:
        key, _, value = item.partition("=")
        listed = re.fullmatch(r"\[(.*)\]", value.strip())
        files = {
            name: config_root() / "conf" / key / f"{name}.yaml"
            for name in (listed[1].replace(" ", "").split(",") if listed else [])
        }
        owner: dict[str, str] = {}
        for name, file in files.items():
            for filled in yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else ():
                if owner.setdefault(filled, name) != name:
                    raise ConfigError(
                        key, f"'{owner[filled]}' and '{name}' both fill '{key}.{filled}'", value=value,
                        hint=f"choose one, and set {key}.{filled}.KEY=… for the rest",
                    )  # fmt: skip


def plain(full: DictConfig) -> dict[str, Any]:
    """The run's config without Hydra's own node, interpolations resolved, still-missing values as '???'."""
    bare = OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])
    content = OmegaConf.to_container(bare, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def jobs_of(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every job that a command line stands for: one, or each point of a multirun."""
    yield from command_of(arguments)[0]


def command_of(arguments: Sequence[str]) -> tuple[list[list[str]], bool]:
    """The overrides of every job that a command line stands for, and whether they are the points of a sweep.

    A sweep may be asked for by -m, or by an experiment file that sets hydra.mode and hydra.sweeper.params.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise translate(error, overrides) from error
    fixed = [item.input_line for item in parsed if not item.is_sweep_override() and item.input_line]
    given = {item.key_or_group: [item.input_line] for item in parsed if not item.is_sweep_override()}
    swept = {
        item.get_key_element(): [
            f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()
        ]
        for item in parsed
        if item.is_sweep_override()
    }
    base = compose_run(fixed)
    multirun = base.hydra["mode"].endswith("MULTIRUN") or bool({"-m", "--multirun"} & set(arguments))
    if swept and not multirun:
        raise ConfigError(next(iter(swept)), "several values are a sweep", hint="add -m to run each of them")
    if multirun:
        for key, values in (base.hydra["params"] or {}).items():
            if key not in swept and key not in given:
                sweep = OverridesParser.create().parse_override(f"{key}={values}")
                swept[key] = (
                    [f"{key}={value}" for value in sweep.sweep_string_iterator()]
                    if sweep.is_sweep_override()
                    else [f"{key}={values}"]
                )
    return [[*fixed, *point] for point in product(*swept.values())], multirun


def translate(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """A ConfigError from what Hydra or OmegaConf raised."""
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    for cause in causes:
        if isinstance(cause, OverrideParseException):
            hint = "quote it for the shell, and what is special to Hydra once more: 'key=\"a=b\"'"
            return ConfigError("", f"cannot be read: {cause.message}", value=cause.override, hint=hint)
    option = re.search(r"(?:In '.*?': )?Could not (?:find|load) '([^']+)'", text)
    if option:
        group, _, name = option[1].rpartition("/")
        if group == "hydra/launcher" and name in EXTRAS:
            return ConfigError(
                "launcher", f"needs what is not installed: the plugin for hydra/launcher={name}",
                value=_value_in("launcher", overrides), hint=f"pip install 'reprune[{EXTRAS[name]}]'",
            )  # fmt: skip
        options = _options(group)
        return ConfigError(
            group or "option",
            "no such option",
            value=name,
            accepted=options,
            hint=did_you_mean(name, options),
        )
    unmatched = re.search(r"Could not override '([^']+)'.*?No match in the defaults list", text, re.DOTALL)
    if unmatched:
        groups = sorted({path.name for path in (config_root() / "conf").iterdir() if path.is_dir()})
        word = unmatched[1].split("@")[0].split("=")[0]
        return ConfigError(
            unmatched[1], "no such group of options", accepted=groups, hint=did_you_mean(word, groups)
        )
    key = re.search(r"full_key: (\S+)", text)
    name = key[1] if key else (re.search(r"Key '([^']+)'", text) or ["", ""])[1]
    if "not in" in text and name:
        return _unknown_key(name, overrides)
    problem = next(
        (str(cause) for cause in reversed(causes) if str(cause)), type(error).__name__
    ).splitlines()[0]
    return ConfigError(name, problem.strip(), value=_value_in(name, overrides), accepted=_type_of(name))


def _number_as_option(error: ValueError, overrides: Sequence[str]) -> ConfigError:
    """Hydra refuses a number where an option's name belongs with a bare ValueError that does not say which."""
    for item in overrides:
        key, _, value = item.lstrip("+").partition("=")
        options = _options(key.split("@")[0])
        if options and value not in options:
            return ConfigError(
                key, "no such option", value=value, accepted=options, hint=did_you_mean(value, options)
            )
    return ConfigError("", str(error))


def _unknown_key(name: str, overrides: Sequence[str]) -> ConfigError:
    head, _, last = name.rpartition(".")
    value = _value_in(name, overrides)
    if not head:
        top = list(RunConfig.__dataclass_fields__)
        return ConfigError(
            name, f"unknown key{files_with(name)}", value=value, accepted=top, hint=did_you_mean(last, top)
        )
    return ConfigError(name, f"unknown key{files_with(name, overrides)}", value=value, accepted=_siblings(head, overrides, last)[0], hint=_siblings(head, overrides, last)[1])  # fmt: skip


def _siblings(head: str, overrides: Sequence[str], last: str) -> tuple[list[str] | None, str | None]:
    rest = [item for item in overrides if not item.lstrip("+~").startswith(f"{head}.{last}")]
    if len(rest) == len(overrides):
        return None, None
    try:
        node: Any = compose_run(rest).config
    except ConfigError:
        return None, None
    for part in head.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    keys = [key for key in node if key != "_target_"] if isinstance(node, dict) else None
    return keys, did_you_mean(last, keys) if keys else None


def _value_in(name: str, overrides: Sequence[str]) -> str | None:
    for item in overrides:
        key, _, value = item.partition("=")
        if name and key.lstrip("+~") == name:
            return value
    return None


def _type_of(name: str) -> str | None:
    found = RunConfig.__dataclass_fields__.get(name)
    return str(found.type).replace("None", "null") if found else None


def _options(group: str) -> list[str]:
    for base in (config_root() / "conf" / group, config_root() / group):
        if base.is_dir():
            return sorted(path.stem for path in base.glob("*.yaml"))
    return []


def files_with(key: str, overrides: Sequence[str] | None = None) -> str:
    """' (in FILE)' for an experiment or arm file that sets the dotted key, else nothing; of those `overrides` name."""
    for folder in ("experiments", "conf/arm", "sweeps"):
        for path in sorted((config_root() / folder).rglob("*.yaml")):
            if overrides is not None and not any(path.stem in item for item in overrides):
                continue
            node: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            for part in key.split("."):
                node = node.get(part, None) if isinstance(node, dict) else None
            if node is not None:
                return f" (in {path.relative_to(config_root())})"
    return ""
