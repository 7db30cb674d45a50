"""The launchers for more than one device, each on what stands in for its cluster here."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

import reprune
from helpers import overrides_for
from launching import ended, finished, frame, launch, running, wait_for_the_end_of, wait_until
from reprune import machine, run
from reprune.files import read_json
from reprune.reporting.status import status_rows

GRID = ("pruner=wanda,magnitude", "model.num_blocks=12")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


def _in_process(output_dir: Path, monkeypatch: pytest.MonkeyPatch, *grid: str) -> pd.DataFrame:
    """The frame of the same sweep as the laptop does it."""
    overrides = overrides_for(output_dir, "sweep.own_process=false", *grid)
    monkeypatch.setattr(sys, "argv", ["reprune", "-m", *overrides])
    run.main()
    return frame(output_dir)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, a GPU declared on each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "num_gpus": 1,
            "include_dashboard": False,
            "object_store_memory": 2**27,
        },
    )
    try:
        cluster.second = cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=2**27)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def _node_of(pid: int, cluster: Any) -> str | None:
    """'head' or 'second': whose raylet a job's process descends from."""
    raylets = {
        node.all_processes["raylet"][0].process.pid: name
        for name, node in (("head", cluster.head_node), ("second", cluster.second))
    }
    try:
        above = [process.pid for process in psutil.Process(pid).parents()]
    except psutil.NoSuchProcess:
        return None
    return next((raylets[one] for one in above if one in raylets), None)


def test_ray_cluster_that_loses_a_node(
    two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches jobs that share a GPU, a lost node that ends the sweep, and jobs that are lost with it."""
    out = tmp_path / "out"
    grid = (
        "pruner=wanda,magnitude,random",
        "seed=0,1",
        "model.num_blocks=6",
        "reconstruction.epochs=100",
    )
    # A worker of a cluster knows neither this process's environment nor its folder.
    monkeypatch.chdir(tmp_path)
    driver = launch(
        Path("out"), "launcher=ray", "hydra.launcher.ray.remote.num_cpus=1", *grid, RAY_ADDRESS=two_nodes.address,
        REPRUNE_CACHE=str(tmp_path / "shared"),
    )  # fmt: skip

    def under_way(node: str) -> tuple[str, int] | None:
        """A run that is being pruned on that node, and its process."""
        for name, facts in running(out).items():
            if facts.get("block", 0) >= 1 and _node_of(facts["pid"], two_nodes) == node:
                return name, facts["pid"]
        return None

    def stopped() -> tuple[str, int] | None:
        """One on the second node that waits from now on while its node is taken away, however long that takes."""
        found = under_way("second")
        if found is not None:
            try:
                os.kill(found[1], signal.SIGSTOP)
            except ProcessLookupError:
                return None
            if (out / found[0] / "result.json").exists():
                os.kill(found[1], signal.SIGCONT)
                return None
        return found

    lost, pid = wait_until(stopped, "a job on the second node", driver)
    wait_until(lambda: finished(out) >= 1, "the middle of the sweep", driver)
    beside, _ = wait_until(lambda: under_way("head"), "a job on the first node", driver)
    seen = {read_json(out / run / "environment.json")["visible_devices"] for run in (lost, beside)}
    assert seen == {"0"}, "each node has one GPU, and its job sees that one"
    assert any(row["state"] == "queued" for row in status_rows([out])), "whoever asks sees what waits"
    two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    wait_for_the_end_of(pid)
    assert not (out / lost / "result.json").exists()
    code, said = ended(driver)
    assert code == 0, said
    assert list(reprune.results(out)["state"]) == ["finished"] * 6
    assert (tmp_path / "shared").is_dir()
    pd.testing.assert_frame_equal(frame(out), _in_process(tmp_path / "alone", monkeypatch, *grid))


def test_box(tmp_path: Path) -> None:
    """Catches jobs that get no cores, or all of them, and more at a time than was asked for."""
    pytest.importorskip("ray")
    threads = machine.cpus_a_job(1)
    code, said = ended(
        launch(tmp_path / "out", "launcher=box", "sweep.jobs=1", "threads=null", "pruner=wanda,none")
    )
    assert code == 0, said
    assert list(reprune.results(tmp_path / "out")["state"]) == ["finished"] * 2
    told = [read_json(path) for path in (tmp_path / "out").glob("*/status.json")]
    spans = sorted((facts["begun_s"], facts["unix_time_s"]) for facts in told)
    assert spans[0][1] <= spans[1][0], "one at a time"
    environments = [read_json(path) for path in (tmp_path / "out").glob("*/environment.json")]
    assert [environment["threads"] for environment in environments] == [threads] * 2


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches jobs that get all cores or none, more jobs than GPUs, and cores of GPUs that are not there."""
    monkeypatch.setattr(machine, "cpus", lambda: 16)
    for gpus, jobs, each in ((0, 2, 8), (0, 5, 3), (4, 2, 4), (8, 1, 2), (0, 99, 1)):
        monkeypatch.setattr(machine, "_gpus", lambda gpus=gpus: gpus)
        assert machine.cpus_a_job(jobs) == each
        assert machine.cpus_of_all(jobs) == each * (gpus or jobs)
        assert machine.gpus_a_job() == (1 if gpus else 0)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A queue that speaks as Slurm does and runs on this machine; the folder with what it was asked."""
    pytest.importorskip("submitit")
    room, commands = tmp_path / "slurm", tmp_path / "commands"
    room.mkdir()
    commands.mkdir()
    text = Path(__file__).with_name("fake_slurm.py").read_text(encoding="utf-8")
    for name in ("sbatch", "srun", "scontrol", "sacct", "scancel"):
        (commands / name).write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("FAKE_SLURM", str(room))
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    return room


def _asked(room: Path) -> list[dict[str, Any]]:
    path = room / "asked.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_slurm_array_that_runs_out_of_time(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a script that asks for the wrong things, and a time limit that loses windows or counts as a failure."""
    out = tmp_path / "out"
    # Long enough that a task, told to end, does not end by itself first.
    grid = (*GRID, "reconstruction.epochs=500")
    driver = launch(out, "launcher=slurm", "hydra.launcher.timeout_min=5", *grid)

    def both() -> bool:
        return len([facts for facts in running(out).values() if facts.get("block", 0) >= 1]) == 2

    wait_until(both, "two tasks of the array under way", driver)
    for entry in [entry for entry in _asked(slurm) if "started" in entry]:
        # Slurm tells every process of a job that its time is up, and one that it takes the machine back.
        os.killpg(entry["pid"], signal.SIGTERM)
        os.killpg(entry["pid"], signal.SIGUSR2)
    code, said = ended(driver)
    assert code == 0, said
    script = (slurm / "submitted.sh").read_text()
    asked = (
        "array=0-1%2",
        "gpus-per-node=1",
        "cpus-per-task=8",
        "mem=32GB",
        "signal=USR2@180",
        "time=5",
        "requeue",
    )
    assert [line for line in asked if f"#SBATCH --{line}\n" not in script] == []
    again = [entry["arguments"][1] for entry in _asked(slurm) if entry.get("command") == "scontrol"]
    assert sorted(again) == ["100_0", "100_1"]
    first = [read_json(path)["first_block"] for path in out.glob("*/status.json")]
    assert max(first) >= 1, "what was frozen before the limit stays"
    pd.testing.assert_frame_equal(frame(out), _in_process(tmp_path / "alone", monkeypatch, *grid))


def test_submitit_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path without a queue: catches jobs that need more than what submitit hands them."""
    pytest.importorskip("submitit")
    code, said = ended(launch(tmp_path / "out", "hydra/launcher=submitit_local", "pruner=wanda,none"))
    assert code == 0, said
    assert list(reprune.results(tmp_path / "out")["state"]) == ["finished"] * 2
