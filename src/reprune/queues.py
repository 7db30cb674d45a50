"""Whether what a launcher hands its jobs to is there."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any

from reprune.errors import ConfigError

LOG = logging.getLogger("reprune")


def check_queue(launcher: str, cluster: Mapping[str, Any] | None) -> None:
    """Refuse, with a ConfigError, a queue that is not on this machine and a Ray cluster that does not answer.

    `launcher` is Hydra's; `cluster` says where a Ray cluster is and what a job asks of it, None where it is none.
    """
    if launcher == "submitit_slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            "launcher", "there is no Slurm on this machine: no sbatch and srun on the path", value="slurm",
            accepted="slurm on a login node of a cluster", hint="launcher=laptop or launcher=box",
        )  # fmt: skip
    if cluster is not None:
        _check_cluster(cluster)


def _check_cluster(cluster: Mapping[str, Any]) -> None:
    """The cluster answers; where no node of it can take a job now, that is told, as one may join."""
    import ray

    try:
        ray.init(address=cluster["address"], log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(
            "launcher", "no Ray cluster answers", value=f"ray, RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}",
            accepted="ray beside a cluster that is up",
            hint="start one ('ray start --head') or set RAY_ADDRESS=HOST:PORT; launcher=box needs none",
        ) from error  # fmt: skip
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()
    asked = {"GPU": cluster["num_gpus"], "CPU": cluster["num_cpus"]}
    if not any(all(node.get(name, 0) >= count for name, count in asked.items()) for node in nodes):
        have = "; ".join(f"{node.get('GPU', 0):g} and {node.get('CPU', 0):g}" for node in nodes)
        LOG.warning(
            "a run asks for %g GPUs and %g CPUs, and no node of the Ray cluster has them (%s): all runs wait until one joins; "
            "hydra.launcher.ray.remote.num_gpus and .num_cpus ask for less",
            asked["GPU"],
            asked["CPU"],
            have,
        )
