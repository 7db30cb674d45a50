"""Points of a grid that make no sense: `sweep.skip`, a list of rules, each a mapping of choices and keys to values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reprune.compose import Composed
from reprune.config_files import options_of
from reprune.errors import ConfigError, did_you_mean, require_option

_ABSENT = object()


def left_out(composed: Composed) -> bool:
    """Whether a rule names this point: all that the rule says is so. A value that is a list stands for any of them."""
    return any(_falls_under(composed, rule) for rule in composed.sweep["skip"])


def check_rules(points: Sequence[Composed]) -> None:
    """ConfigError for a rule that is empty, or that speaks of what no point of the grid has."""
    for rule in points[0].sweep["skip"]:
        if not rule:
            raise ConfigError("sweep.skip", "an empty rule would skip every point", value="{}")
        for key, wanted in rule.items():
            if all(_value(point, key) is _ABSENT for point in points):
                known = [*points[0].choices, *points[0].config]
                raise ConfigError(
                    "sweep.skip", "a rule speaks of what no point has", value=key,
                    accepted="groups of options and dotted keys", hint=did_you_mean(key, known),
                )  # fmt: skip
            if points[0].choices.get(key):
                for option in wanted if isinstance(wanted, list) else [wanted]:
                    require_option(f"sweep.skip ({key})", option, options_of(key.partition("@")[0]))


def idle_rules(points: Sequence[Composed]) -> list[str]:
    """Rules that no point falls under, in words: as they stand in `sweep.skip`."""
    return [
        ", ".join(f"{key}: {wanted}" for key, wanted in rule.items())
        for rule in points[0].sweep["skip"]
        if not any(_falls_under(point, rule) for point in points)
    ]


def _falls_under(composed: Composed, rule: Mapping[str, Any]) -> bool:
    return all(_says(_value(composed, key), wanted) for key, wanted in rule.items())


def _value(composed: Composed, key: str) -> Any:
    if composed.choices.get(key):
        return composed.choices[key]
    node: Any = composed.config
    for part in key.split("."):
        node = node.get(part, _ABSENT) if isinstance(node, Mapping) else _ABSENT
    return node


def _says(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and not isinstance(value, list):
        return value in wanted
    return bool(value == wanted)
