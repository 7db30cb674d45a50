"""Compose configs the way Hydra will, before Hydra does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reprune import machine
from reprune.compose_errors import check_composed, number_as_option, translate
from reprune.config_files import config_root
from reprune.errors import ConfigError
from reprune.files import sha256_of_json
from reprune.schema import register

ROOT_VARIABLE = "REPRUNE_CONFIG_ROOT"


def prepare() -> Path:
    """Register schema and resolvers, tell the search path where experiments lie, and return the config folder."""
    register()
    machine.register()
    os.environ[ROOT_VARIABLE] = str(config_root())
    return config_root() / "conf"


@dataclass(frozen=True)
class Composed:
    """A run's config as plain data, its choices of options by group, and the overrides that led to it.

    `sweep` is what belongs to the whole sweep, and `hydra` its mode, grid and launcher: neither is recorded with the run.
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
    def launcher(self) -> str:
        """Hydra's launcher, where Hydra composed a whole command."""
        return str(self.hydra.get("launcher", ""))

    @property
    def key(self) -> str:
        """The point's name in a sweep, the same in every process: hash of its config and its choices."""
        return sha256_of_json([self.config, self.choices])

    @property
    def sweep_folder(self) -> Path:
        """Where sweeps into `output_dir` keep what they know of their points."""
        return Path(self.config["output_dir"]) / ".multirun"

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
                "launcher": choices.get("hydra/launcher"),
                "params": dict(full.hydra.sweeper.get("params") or {}),
                "cluster": _cluster(full),
            }
            config = plain(full)
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error, overrides) from error
    except ValueError as error:
        raise number_as_option(error, overrides) from error
    finally:
        GlobalHydra.instance().clear()
    check_composed(config, overrides)
    return Composed.of(config, choices, overrides, hydra)


def _cluster(full: DictConfig) -> dict[str, Any] | None:
    """Where the Ray cluster is that jobs go to, and what one of them asks of it; None where there is none to find."""
    address = OmegaConf.select(full, "hydra.launcher.ray.init.address")
    if address is None or address == "local":
        return None
    remote = full.hydra.launcher.ray.remote
    return {"address": address, "num_gpus": remote.num_gpus or 0, "num_cpus": remote.num_cpus or 0}


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
