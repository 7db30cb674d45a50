"""What launcher configs ask of this machine, as interpolations: `${reprune.cpus:}` and its like."""

from __future__ import annotations

import os

from omegaconf import OmegaConf

FAMILIES = ("REPRUNE_", "HF_", "WANDB_")


def register() -> None:
    """Make the resolvers known to OmegaConf, and Ray's log whole; the resolvers are asked only where a launcher is made."""
    # Otherwise Ray shows one job's lines and counts those of the others.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    for name, resolver in RESOLVERS:
        OmegaConf.register_new_resolver(f"reprune.{name}", resolver, replace=True)


def environment() -> dict[str, str]:
    """What of this process's environment a job on another machine needs; no keys and tokens, which others could read there."""
    secret = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(FAMILIES) and not any(word in name for word in secret)
    }


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_a_job() -> int:
    """One where there is any."""
    return 1 if _gpus() else 0


def cpus_a_job(jobs: int) -> int:
    """Cores for each of the jobs that run at a time: one on each GPU, `jobs` of them where there is none."""
    return max(1, cpus() // (_gpus() or jobs))


def cpus_of_all(jobs: int) -> int:
    """Cores of all the jobs that run at a time, so that no more of them do."""
    return cpus_a_job(jobs) * (_gpus() or jobs)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


RESOLVERS = (
    ("gpus_a_job", gpus_a_job),
    ("cpus_a_job", cpus_a_job),
    ("cpus_of_all", cpus_of_all),
    ("environment", environment),
)
