"""Queues that are not there are told of before a sweep begins."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from helpers import overrides_for
from reprune import run
from reprune.compose import compose_run
from reprune.errors import ConfigError
from reprune.queues import check_queue

CLUSTER = {"address": "auto", "num_gpus": 1, "num_cpus": 4}


def test_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trace of submitit's where a sentence would do."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no Slurm on this machine"):
        check_queue("submitit_slurm", None)
    check_queue("basic", None)


def test_no_ray_cluster(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a trace of Ray's where nothing runs, and a cluster that is looked for when it is not asked for."""
    ray = pytest.importorskip("ray")

    def refuses(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", refuses)
    overrides = overrides_for(tmp_path, "pruner=wanda,magnitude", "launcher=ray")
    monkeypatch.setattr("sys.argv", ["reprune", "-m", *overrides])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "no Ray cluster answers" in told
    assert "launcher=box" in told


def test_where_a_cluster_is_looked_for() -> None:
    """Catches a check of `box`, which starts a cluster of its own, and one that asks for something else than the jobs do."""
    pytest.importorskip("ray")
    assert compose_run(["launcher=ray"]).hydra["cluster"] == CLUSTER
    assert (
        compose_run(["launcher=ray", "hydra.launcher.ray.remote.num_gpus=0.5"]).hydra["cluster"]["num_gpus"]
        == 0.5
    )
    for launcher in ("box", "laptop", "slurm"):
        assert compose_run([f"launcher={launcher}"]).hydra["cluster"] is None


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([{"CPU": 8.0, "GPU": 1.0}], False),
        ([{"CPU": 8.0}, {"CPU": 2.0, "GPU": 4.0}], True),
        ([], True),
    ],
)
def test_a_cluster_that_cannot_take_a_run(
    nodes: list[dict[str, float]],
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches sweeps that wait for ever without a word, and a check that adds up what lies on different nodes."""
    ray = pytest.importorskip("ray")
    ended: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [lost, *({"Alive": True, "Resources": node} for node in nodes)])
    monkeypatch.setattr(logging.getLogger("reprune"), "propagate", True)
    with caplog.at_level(logging.WARNING, "reprune"):
        check_queue("ray", CLUSTER)
    assert ("wait until one joins" in caplog.text) == told
    assert ended == [True]
