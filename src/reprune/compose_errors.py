"""What is wrong with a command line, on one screen: from what Hydra and OmegaConf raise, and what they let pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml
from hydra.errors import OverrideParseException

from reprune.config_files import config_root, files_with, options_of
from reprune.errors import ConfigError, did_you_mean
from reprune.schema import ExportConfig, RunConfig, SweepConfig

EXTRAS = {"ray": "ray", "submitit_slurm": "slurm", "submitit_local": "slurm"}
"""By launcher of Hydra's: the extra of this package that installs it."""


def check_composed(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse what composes and is wrong all the same. Raises ConfigError."""
    _check_keys(config, RunConfig, "", overrides)
    _check_emptied(config, overrides)
    _check_lists(overrides)
    _check_keys(config["export"], ExportConfig, "export.", overrides)
    _check_keys(config["sweep"], SweepConfig, "sweep.", overrides)


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
        options = options_of(group)
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


def number_as_option(error: ValueError, overrides: Sequence[str]) -> ConfigError:
    """Hydra refuses a number where an option's name belongs with a bare ValueError that does not say which."""
    for item in overrides:
        key, _, value = item.lstrip("+").partition("=")
        options = options_of(key.split("@")[0])
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
    from reprune.compose import compose_run

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
