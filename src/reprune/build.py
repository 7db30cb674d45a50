"""From config nodes to objects: the one place that instantiates, and the check of every key against a signature."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from reprune.config_files import config_root, files_with
from reprune.errors import ConfigError, did_you_mean

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def build(node: Any, key: str, where: Mapping[str, str] | None = None) -> Any:
    """Build the object that a node with a `_target_` describes; nested nodes first.

    `where` maps a group's key to the file its option comes from, for messages. Raises ConfigError for a node without
    target, an unknown or missing key, a wrong type, and whatever the constructor refuses.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(
            key, "this is not an option of its group", value=node, hint=f"choose one, e.g. {key}=NAME"
        )
    target = _import(str(node["_target_"]), key)
    given = {name: value for name, value in node.items() if name != "_target_"}
    parameters = dict(inspect.signature(target).parameters)
    source = _source(key, where)
    for name in given:
        if name not in parameters:
            raise ConfigError(
                f"{key}.{name}",
                f"unknown key{files_with(f'{key}.{name}') or source}",
                value=given[name],
                accepted=parameters,
                hint=did_you_mean(str(name), parameters),
            )
    for name, parameter in parameters.items():
        required = name not in given and parameter.default is inspect.Parameter.empty
        if required or given.get(name) == "???":
            raise ConfigError(
                f"{key}.{name}",
                f"has to be set{source}",
                accepted=_about(key, where),
                hint=f"e.g. {key}.{name}=…",
            )
    # A dataclass inherits annotations from other modules, whose names only the class itself resolves.
    plain_class = inspect.isclass(target) and not is_dataclass(target)
    hints = get_type_hints(target.__init__ if plain_class else target)
    arguments = {
        name: _value(value, f"{key}.{name}", hints.get(name, Any), where) for name, value in given.items()
    }
    try:
        return target(**arguments)
    except ConfigError as error:
        raise error.under(key) from None


def _value(value: Any, key: str, hint: Any, where: Mapping[str, str] | None) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        return build(value, key, where)
    if isinstance(value, Mapping):
        value = {name: _value(item, f"{key}.{name}", Any, where) for name, item in value.items()}
    try:
        return TypeAdapter(hint, config=_STRICT).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(
            str(part) for part in problem["loc"] if part in (value if isinstance(value, Mapping) else ())
        )
        raise ConfigError(
            f"{key}.{place}" if place else key,
            "wrong type or value",
            value=f"{value!r} ({type(value).__name__})",
            accepted=_words(hint),
            hint=did_you_mean(value, _choices(hint)) if isinstance(value, str) else None,
        ) from error


def _choices(hint: Any) -> list[str]:
    """The words of a Literal, also inside a union."""
    if get_origin(hint) is Literal:
        return [word for word in get_args(hint) if isinstance(word, str)]
    return [word for part in get_args(hint) for word in _choices(part)]


def _words(hint: Any) -> str:
    text = getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint)
    text = re.sub(r"typing\.|collections\.abc\.", "", str(text))
    return re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace("'", ""), text).replace("None", "null")


def _import(target: str, key: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, NameError, SyntaxError, TypeError) as error:
        raise ConfigError(
            f"{key}._target_", f"cannot be imported: {error}", value=target, accepted="package.module.Class"
        ) from error


def _about(key: str, where: Mapping[str, str] | None) -> str | None:
    """What the option's file says of it in its first line."""
    file = config_root() / (where or {})[key] if key in (where or {}) else None
    if file is None or not file.is_file():
        return None
    with file.open(encoding="utf-8") as stream:
        first = stream.readline().strip()
    return first.removeprefix("# ") if first.startswith("# ") else None


def _source(key: str, where: Mapping[str, str] | None) -> str:
    found = [name for name in where or {} if key == name or key.startswith(f"{name}.")]
    return f" (option {(where or {})[max(found, key=len)]})" if found else ""
