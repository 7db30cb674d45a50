"""What launcher configs ask of this machine, as interpolations: `${reprune.cpus:}` and its like."""

from __future__ import annotations

import os

from omegaconf import OmegaConf


def register() -> None:
    """Make the resolvers known to OmegaConf, and Ray's log whole; the resolvers are asked only where a launcher is made."""
    # Otherwise Ray shows one job's lines and counts those of the others.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    for name, resolver in (("cpus", cpus), ("gpus_a_job", gpus_a_job), ("cpus_a_job", cpus_a_job)):
        OmegaConf.register_new_resolver(f"reprune.{name}", resolver, replace=True)


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_a_job() -> int:
    """One where there is any."""
    return 1 if _gpus() else 0


def cpus_a_job(jobs: int) -> int:
    """Cores for each of the jobs that run at a time: one on each GPU, `jobs` of them where there is none."""
    return max(1, cpus() // (_gpus() or jobs))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
