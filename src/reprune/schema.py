"""RunConfig: the one structured config. Unknown top-level keys and wrong types are refused when it is composed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ExportConfig:
    """What is written beside the record."""

    model: bool = False
    masks: bool = False
    compact: bool = False


@dataclass
class MemoryConfig:
    """Where weights and activations rest, auto | memory | disk, and what a run has to stay below, e.g. 6GiB."""

    weights: str = "auto"
    activations: str = "auto"
    host_limit: str | None = None
    device_limit: str | None = None


@dataclass
class SweepConfig:
    """What a whole sweep is launched with: no part of what a run is, nor of its record."""

    confirm: bool = False
    max_runs: int = 200
    max_hours: float | None = None
    jobs: int = 2
    own_process: bool = True
    elsewhere: bool = False
    skip: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RunConfig:
    """One run. The nodes typed Any are options of the groups in conf/, each with a `_target_`."""

    model: Any = MISSING
    transform: Any = None
    calibration: Any = MISSING
    reconstruction_data: Any = MISSING
    probes: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    pruner: Any = MISSING
    refine: Any = None
    pattern: Any = MISSING
    allocation: Any = MISSING
    schedule: Any = MISSING
    reconstruction: Any = MISSING
    evaluation: dict[str, Any] = field(default_factory=dict)
    tracking: Any = MISSING
    export: ExportConfig = field(default_factory=ExportConfig)
    experiment: str = "default"
    published: str | None = None
    sparsity: float | None = None
    targets: str = "all"
    target_blocks: str = "all"
    seed: int = 0
    seed_data: int | None = None
    seed_training: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output_dir: str = "outputs"
    max_overlap: float = 0.0
    allow_overlap: bool = False
    dry_run: bool = False
    profile: bool = False
    sweep: SweepConfig = field(default_factory=SweepConfig)


def register() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml begins with."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
