"""The launchers for more than one device, each on what stands in for its cluster here."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import reprune
from helpers import overrides_for
from launching import at_block, ended, frame, launch, wait_until
from reprune import run
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


def test_ray_cluster_that_loses_a_node(
    two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches jobs that share a GPU, a lost node that ends the sweep, and jobs that are lost with it."""
    grid = ("pruner=wanda,magnitude,random,sparsegpt", "seed=0,1", *GRID[1:])
    driver = launch(
        tmp_path / "out", "launcher=ray", "hydra.launcher.ray.remote.num_cpus=1", *grid,
        RAY_ADDRESS=two_nodes.address,
    )  # fmt: skip

    def both_nodes() -> bool:
        begun = [path.parent for path in (tmp_path / "out").glob("*/environment.json")]
        return len(begun) >= 2

    wait_until(both_nodes, "two jobs at a time")
    queued = [row for row in status_rows([tmp_path / "out"]) if row["state"] == "queued"]
    assert queued, "whoever asks sees what waits"
    two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    code, said = ended(driver)
    assert code == 0, said
    results = reprune.results(tmp_path / "out")
    assert list(results["state"]) == ["finished"] * 8
    seen = {read_json(path)["visible_devices"] for path in (tmp_path / "out").glob("*/environment.json")}
    assert seen == {"0"}, "each node has one GPU, and each job sees that one"
    pd.testing.assert_frame_equal(
        frame(tmp_path / "out"), _in_process(tmp_path / "alone", monkeypatch, *grid)
    )


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
    driver = launch(out, "launcher=slurm", "hydra.launcher.timeout_min=5", *GRID, "reconstruction.epochs=20")
    at_block(out, 2)
    # Two minutes before its end a job is told by a signal to all its processes.
    early = [entry for entry in _asked(slurm) if "started" in entry]
    for entry in early:
        _signal_group(entry["pid"])
    code, said = ended(driver)
    assert code == 0, said
    script = (slurm / "submitted.sh").read_text()
    for line in (
        "--array=0-1%2",
        "--gpus-per-node=1",
        "--cpus-per-task=8",
        "--mem=32GB",
        "--signal=USR2@180",
        "--time=5",
    ):
        assert f"#SBATCH {line}" in script
    again = [entry["arguments"][1] for entry in _asked(slurm) if entry.get("command") == "scontrol"]
    assert sorted(again) == ["100_0", "100_1"]
    first = [read_json(path)["first_block"] for path in out.glob("*/status.json")]
    assert max(first) >= 2, "what was frozen before the limit stays"
    pd.testing.assert_frame_equal(
        frame(out), _in_process(tmp_path / "alone", monkeypatch, *GRID, "reconstruction.epochs=20")
    )


def _signal_group(pid: int) -> None:
    import os

    os.killpg(pid, signal.SIGUSR2)


def test_submitit_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path without a queue: catches jobs that need more than what submitit hands them."""
    pytest.importorskip("submitit")
    code, said = ended(launch(tmp_path / "out", "hydra/launcher=submitit_local", "pruner=wanda,none"))
    assert code == 0, said
    assert list(reprune.results(tmp_path / "out")["state"]) == ["finished"] * 2
