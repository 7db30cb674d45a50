"""Errors meant for a person: what was given, what is accepted, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A choice that cannot be run, found before any weight is loaded.

    `key` is the dotted config key, `value` what it holds, `accepted` what it may hold, `hint` what to do.
    """

    def __init__(
        self,
        key: str,
        problem: str,
        *,
        value: object = None,
        accepted: Iterable[str] | str | None = None,
        hint: str | None = None,
    ) -> None:
        self.key = key
        self.problem = problem
        self.value = value
        self.accepted = accepted if accepted is None or isinstance(accepted, str) else ", ".join(accepted)
        self.hint = hint
        super().__init__(self.screen())

    def under(self, prefix: str) -> ConfigError:
        """The same error with its key placed below `prefix`."""
        key = f"{prefix}.{self.key}" if self.key else prefix
        return ConfigError(key, self.problem, value=self.value, accepted=self.accepted, hint=self.hint)

    def screen(self) -> str:
        """The message as a person reads it, one line a fact."""
        lines = [f"{self.key}: {self.problem}" if self.key else self.problem]
        if self.value is not None:
            lines.append(f"  given     {self.value}")
        if self.accepted:
            lines.append(f"  accepted  {self.accepted}")
        if self.hint:
            lines.append(f"  to do     {self.hint}")
        return "\n".join(lines)


class RunError(RuntimeError):
    """A run that could not go on; the message names block, layer and what to change."""


class HeldError(RunError):
    """A run that another process is at; the message names it."""


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that `word` was probably meant to be, or None."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """A hint that names the nearest option, or None."""
    found = nearest(word, options)
    return f"did you mean '{found}'?" if found else None


def require_positive(**values: float | None) -> None:
    """Raise ConfigError unless every given value is None or greater than zero."""
    for key, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(key, "must be greater than zero", value=value)


def require_nonnegative(**values: float | None) -> None:
    """Raise ConfigError unless every given value is None or at least zero."""
    for key, value in values.items():
        if value is not None and not value >= 0:
            raise ConfigError(key, "must not be negative", value=value)


def require_option(key: str, value: str, options: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `options`."""
    options = list(options)
    if value not in options:
        raise ConfigError(
            key, "unknown choice", value=value, accepted=options, hint=did_you_mean(str(value), options)
        )
