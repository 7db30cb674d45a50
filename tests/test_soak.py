"""Sweeps that meet many faults, by `make soak`: at the end every byte is that of a sweep which met none.

Kills fall at moments that nobody chose; power goes between the write of a file and its rename, or just behind it; the
disk is full from some write on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import state_bytes
from launching import ended, finished, frame, kill, launch, running, wait_for_the_end_of

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("REPRUNE_SOAK_KILLS", "50"))
EVERY_S = 40
OTHERS = -(-KILLS // 5)
"""Faults of each kind that is no kill: a sweep takes up to one of them a process."""
GRID = ("pruner=wanda,magnitude,random", "seed=0,1", "model.num_blocks=12", "reconstruction.epochs=40")
MOST_RENAMES = 60
"""About how many files the process of one run puts in place."""
FAULTS = Path(__file__).parent / "faults"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep as it is when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = ended(launch(folder / "out", *GRID, REPRUNE_CACHE=str(folder / "cache")))
    assert code == 0, said
    return folder / "out"


def _ends_like(out: Path, undisturbed: Path) -> None:
    """Let the sweep end in peace; its numbers, and every mask and weight of its states, have to be the other's."""
    code, said = ended(launch(out, *GRID))
    assert code == 0, said
    pd.testing.assert_frame_equal(frame(out), frame(undisturbed))
    found, wanted = (
        {path.parent.name: state_bytes(path.parent) for path in place.glob("*/result.json")}
        for place in (out, undisturbed)
    )
    assert found.keys() == wanted.keys()
    for run, tensors in wanted.items():
        assert any("masks." in name for name in tensors)
        assert any("weights." in name for name in tensors)
        assert found[run] == tensors, run


def _stream() -> tuple[int, np.random.Generator]:
    seed = int(np.random.default_rng().integers(2**31))
    return seed, np.random.default_rng(seed)


def _one_again(out: Path) -> None:
    """Done before its faults were: one run has to be done again."""
    shutil.rmtree(next(out.glob("*/result.json")).parent)


def test_killed_at_random_moments(tmp_path: Path, undisturbed: Path) -> None:
    """Catches what a kill in imports, checks, writes or between two runs loses, repeats or changes."""
    (seed, stream), out, kills = _stream(), tmp_path / "disturbed", 0
    while kills < KILLS:
        driver = launch(out, *GRID)
        while kills < KILLS and not _ends_within(driver, float(stream.uniform(0, EVERY_S))):
            kills += 1
            jobs = [facts["pid"] for facts in running(out).values()]
            victim = jobs[0] if jobs and stream.uniform() < 0.5 else driver.pid
            kill(victim)
            who = "job" if victim in jobs else "driver"
            print(f"seed {seed}, kill {kills}: {who}, {finished(out)} runs are finished")
            if victim == driver.pid:
                for job in jobs:
                    wait_for_the_end_of(job)
        driver.communicate()
        if driver.returncode == 0:
            _one_again(out)
    _ends_like(out, undisturbed)


@pytest.mark.parametrize("kind", ["before", "behind", "full"])
def test_faults_at_random_writes(tmp_path: Path, undisturbed: Path, kind: str) -> None:
    """Catches a file that is there by half or in a place of its own order, and a full disk that spoils what was there.

    See faults/sitecustomize.py for the kinds.
    """
    (seed, stream), out, log = _stream(), tmp_path / "disturbed", tmp_path / "faults.log"
    log.touch()
    while (met := len(log.read_text(encoding="utf-8").splitlines())) < OTHERS:
        at = int(stream.integers(1, MOST_RENAMES))
        code, said = ended(
            launch(
                out,
                *GRID,
                PYTHONPATH=os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]),
                FAULT=kind,
                FAULT_AT=str(at),
                FAULT_UNDER=str(out),
                FAULT_LOG=str(log),
            )
        )
        more = len(log.read_text(encoding="utf-8").splitlines()) - met
        print(f"seed {seed}, {kind} at write {at}: {more} processes, {finished(out)} runs are finished")
        if code == 0:
            assert more == 0 or kind != "full", said
            _one_again(out)
    _ends_like(out, undisturbed)


def _ends_within(driver: subprocess.Popen[str], seconds: float) -> bool:
    try:
        driver.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
