"""Where weights and activations rest, and how much room a run takes: chosen before anything is loaded, shown by dry_run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import psutil

from reprune.errors import ConfigError
from reprune.shapes import Sizes

PLACES = ("memory", "disk")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class MemoryPlan:
    """What rests where. `host` is the expected peak of host memory in bytes, `disk` the room on disk that a run takes.

    `host_limit` and `device_limit` are what the run was told to stay below, None where nothing was said.
    """

    weights: str
    activations: str
    host: int
    disk: int
    host_limit: int | None
    device_limit: int | None


def plan_memory(
    asked: Mapping[str, Any], sizes: Sizes, bound: str | None, device: str, *, shared: bool = False
) -> MemoryPlan:
    """The first of: all in memory, weights on disk, activations on disk, both, that stays below the limit.

    The limit is `memory.host_limit`, else what is free now. `bound` says why blocks cannot be read one at a time, None
    where they can; `shared` activations are files that several processes have mapped. What is asked for has passed
    `check_words`. Raises ConfigError where the limit that was asked for is too low; whether there is room where
    none was asked for is for `check_room` to say.
    """
    host_limit = parse_size(asked["host_limit"], "memory.host_limit")
    device_limit = parse_size(asked["device_limit"], "memory.device_limit")
    _check_device(device_limit, asked["device_limit"], sizes, device)
    if asked["weights"] == "disk" and bound is not None:
        raise ConfigError("memory.weights", f"{bound} needs the whole model in memory", value="disk", accepted=["auto", "memory"])  # fmt: skip
    if shared and asked["activations"] == "memory":
        raise ConfigError("memory.activations", "processes that share a run share its activations, which are files then", value="memory", accepted=["auto", "disk"])  # fmt: skip
    limit = psutil.virtual_memory().available if host_limit is None else host_limit
    plans = [
        MemoryPlan(weights, activations, *_room(sizes, weights, activations), host_limit, device_limit)
        for activations, weights in product(PLACES, PLACES)
        if asked["weights"] in ("auto", weights)
        and asked["activations"] in ("auto", activations)
        and not (weights == "disk" and bound is not None)
        and not (activations == "memory" and shared)
    ]
    for plan in plans:
        # Activations that fill most of the room are slow in memory too.
        crowded = (
            asked["activations"] == "auto" and plan.activations == "memory" and 2 * sizes.activations > limit
        )
        if plan.host <= limit and not crowded:
            return plan
    if host_limit is not None:
        raise ConfigError(
            "memory.host_limit",
            f"this run needs about {plans[-1].host / 2**30:.2f} GiB with weights on {plans[-1].weights} and activations "
            f"on {plans[-1].activations}{f', since {bound} needs the whole model' if bound else ''}",
            value=asked["host_limit"],
            hint="raise it, or use a smaller window, fewer or shorter sequences, dtype=bfloat16",
        )  # fmt: skip
    return plans[-1]


def check_words(asked: Mapping[str, Any]) -> None:
    """ConfigError for an amount or a place that is none, whatever the run."""
    for name in ("host_limit", "device_limit"):
        parse_size(asked[name], f"memory.{name}")
    for name in ("weights", "activations"):
        if asked[name] not in ("auto", *PLACES):
            raise ConfigError(
                f"memory.{name}", "no such place", value=asked[name], accepted=["auto", *PLACES]
            )


def _room(sizes: Sizes, weights: str, activations: str) -> tuple[int, int]:
    host = sizes.base + (sizes.weights if weights == "memory" else sizes.weights_at_once)
    return (
        (host + sizes.activations, sizes.disk)
        if activations == "memory"
        else (host, sizes.disk + sizes.activations)
    )


def _check_device(limit: int | None, asked: object, sizes: Sizes, device: str) -> None:
    if limit is None:
        return
    if device != "cuda":
        raise ConfigError("memory.device_limit", f"is for GPUs; this run computes on {device}", value=asked, hint="use memory.host_limit")  # fmt: skip
    if sizes.on_device > limit:
        raise ConfigError(
            "memory.device_limit",
            f"this run needs about {sizes.on_device / 2**30:.2f} GiB on the device",
            value=asked,
            hint="raise it, or use a smaller window or batch, or shorter sequences",
        )


def parse_size(asked: object, key: str) -> int | None:
    """Bytes of '6GiB' or '500 MB'; None for null. ConfigError for anything else."""
    if asked is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", str(asked))
    if found is None or float(found[1]) == 0:
        raise ConfigError(key, "is no amount of memory", value=asked, accepted=f"a number with one of {', '.join(UNITS)}, e.g. 6GiB")  # fmt: skip
    return int(float(found[1]) * UNITS[found[2]])
