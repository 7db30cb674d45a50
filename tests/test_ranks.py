"""A run by two processes against the same by one: masks, errors, who writes, what a dead process leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.distributed import TCPStore

from conftest import MakeModel
from helpers import overrides_for, plan_of, run_tiny, state_bytes
from launching import PATIENCE_S, at_block, ended, kill
from reprune.engine.activations import Stores
from reprune.engine.chains import Chains
from reprune.engine.spread import spreads
from reprune.errors import ConfigError, RunError
from reprune.files import read_json
from reprune.model import device
from reprune.model.device import plan_device
from reprune.pipeline import run
from reprune.ranks import ALONE, Ranks, groups_of
from reprune.reconstruction.gradient import sum_gradients
from reprune.reconstruction.objective import LanguageObjective, Objective, Pairs, WindowObjective
from support import preset, random_text

RUNS: dict[str, tuple[str, ...]] = {
    "sparsegpt": ("pruner=sparsegpt", "reconstruction=br_gp", "reconstruction.epochs=2"),
    "wanda": (
        "pruner=wanda", "reconstruction=br_gp_cr", "calibration.num_sequences=5", "+calibration@validation.v=same",
        "reconstruction.stop_on=v", "reconstruction.token_weight=inverse_energy", "reconstruction.clip_norm=1",
    ),
    "model_gradients": ("pruner=gblm", "reconstruction=none", "allocation=owl", "transform=block_drop", "transform.count=1"),
    "block_gradients": ("pruner=wanda_plus_plus", "reconstruction=submodule", "schedule=iterative"),
    "units": ("method=amp", "reconstruction=least_squares", "calibration.num_sequences=1"),
    "experts": (
        "model.architecture=mixtral", "+model.config.num_local_experts=8", "+model.config.intermediate_size=32",
        "calibration.num_sequences=2", "calibration.length=5", "pruner=sparsegpt", "reconstruction=least_squares",
    ),
    "last_layer": (
        "pruner=sparsegpt", "reconstruction=br_gp_cr", "reconstruction.epochs=1",
        "reconstruction.training_dtype=bfloat16", "reconstruction.last_layer_iterations=2",
    ),
    # Three windows for two processes.
    "independent": ("pruner=sparsegpt", "reconstruction=free_lunch", "reconstruction.epochs=2", "reconstruction.learning_rate=1e-3", "reconstruction.batch_size=1"),
    "independent_on_disk": (
        "pruner=wanda", "refine=dsnot", "model.num_blocks=5", "memory.weights=disk", "reconstruction=least_squares",
        "reconstruction.input_chain=dense", "reconstruction.target_chain=dense", "reconstruction.statistics_chain=dense",
        "reconstruction.trainable=all", "reconstruction.epochs=1", "reconstruction.window=2", "reconstruction.stride=2",
    ),
    "going_on": ("pruner=wanda", "reconstruction=free_lunch", "model.num_blocks=4"),
    "on_disk": ("pruner=sparsegpt", "reconstruction=br_gp_cr", "reconstruction.epochs=1", "memory.weights=disk"),
    "language": ("pruner=magnitude", "reconstruction=full", "reconstruction.learning_rate=1e-4", "transform=vocabulary"),
}  # fmt: skip
AGENT = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
LONG = ("model.num_blocks=10", "reconstruction.epochs=20", "pruner=wanda")


@dataclass(frozen=True)
class Together:
    """What two processes did: the folder of every run by name, what the first said of each, all the other said."""

    runs: Path
    said: dict[str, str]
    others: str
    killed: tuple[int, str, dict[str, Any]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """A run whose second process is killed, under torchrun; then all commands in one pair of processes."""
    folder = tmp_path_factory.mktemp("together")
    killed = _killed(folder / "killed")
    _begun(folder / "going_on")
    commands = [
        {"name": name, "arguments": overrides_for(folder / name, *choices)} for name, choices in RUNS.items()
    ]
    commands += [
        {"name": "again", "arguments": overrides_for(folder / "sparsegpt", *RUNS["sparsegpt"])},
        {"name": "resumed", "arguments": overrides_for(folder / "killed", *LONG)},
        {"name": "undisturbed", "arguments": overrides_for(folder / "undisturbed", *LONG)},
        {"name": "sweep", "arguments": ["-m", *overrides_for(folder / "sweep", "seed=0,1")]},
        {"name": "dry", "arguments": overrides_for(folder / "dry", "dry_run=true")},
        {"name": "elsewhere", "arguments": overrides_for(folder / "no"), "environment": {"LOCAL_WORLD_SIZE": "1"}},
        {"name": "error", "arguments": overrides_for(folder / "error"), "fails": "error"},
        {"name": "defect", "arguments": overrides_for(folder / "defect"), "fails": "defect"},
    ]  # fmt: skip
    # As torchrun's agent does, of which there is none for a pair that does many commands.
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in commands]
    plain = {"environment": {}, "fails": None}
    (folder / "commands.json").write_text(
        json.dumps([{**plain, **it, "port": one.port} for it, one in zip(commands, stores, strict=True)]),
        encoding="utf-8",
    )
    pair = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks_worker.py")), str(folder / "commands.json")],
            env={**os.environ, **AGENT, "RANK": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said, others = (process.communicate(timeout=PATIENCE_S)[0] for process in pair)
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said + others
    parts = said.split("== ")
    found = {part.splitlines()[0]: part + following for part, following in pairwise(parts[1:])}
    return Together(folder, {it["name"]: found[it["name"]] for it in commands}, others, killed)  # type: ignore[index]


def _begun(output_dir: Path) -> None:
    """One process does all windows but the last, so that one of two has none left."""

    def stop(windows: int) -> None:
        if windows == 3:
            raise RunError("enough")

    with pytest.raises(RunError, match="enough"):
        run(plan_of(output_dir, *RUNS["going_on"]), stop)


def _killed(output_dir: Path) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and last status of a run under torchrun whose second process is killed on its way."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reprune",
         *overrides_for(output_dir, *LONG)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    first = at_block(output_dir, 2)["pid"]
    [second] = [
        child.pid
        for child in psutil.Process(driver.pid).children()
        if child.pid != first and "reprune" in child.cmdline()
    ]
    kill(second)
    code, said = ended(driver)
    [status] = output_dir.glob("*/status.json")
    return code, said, read_json(status)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_come_to_what_one_comes_to(together: Together, tmp_path: Path, name: str) -> None:
    """Catches statistics, gradients, losses and errors of one process's sequences alone, and parts of unequal weight."""
    plan, result = run_tiny(tmp_path, *RUNS[name])
    one, two = plan.folder.path, together.runs / name / plan.folder.id
    assert "code 0" in together.said[name], together.said[name]
    bits = different = 0
    for path in sorted((one / "state").glob("*.safetensors")):
        mine, theirs = load_file(path), load_file(two / "state" / path.name)
        assert mine.keys() == theirs.keys()
        for key in mine:
            if key.startswith("masks."):
                bits += 8 * mine[key].size
                different += int(np.unpackbits(mine[key] ^ theirs[key]).sum())
    assert bits
    assert different <= 1e-4 * bits, f"{different} of {bits} bits"
    both = [
        [json.loads(line) for line in (folder / "blocks.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    for mine, theirs in zip(*both, strict=True):
        for when in ("before", "after"):
            _alike(mine[when], theirs[when])
        _alike([_losses(told) for told in mine["training"]], [_losses(told) for told in theirs["training"]])
        tokens = [{layer: row.get("tokens") for layer, row in rows["layers"].items()} for rows in (mine, theirs)]  # fmt: skip
        assert tokens[0] == tokens[1]
    assert read_json(two / "result.json")["identity"] == result["identity"]
    assert read_json(two / "environment.json")["processes"] == 2


def _losses(told: dict[str, Any]) -> dict[str, Any]:
    return {key: told[key] for key in ("epoch_losses", "validation_losses") if key in told}


def _alike(mine: Any, theirs: Any) -> None:
    """Every number within 1 %, and the same names."""
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(mine, list):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            _alike(one, other)
    else:
        assert theirs == pytest.approx(mine, rel=0.01, abs=1e-12)


def test_one_process_writes_and_speaks(together: Together) -> None:
    """Catches lines and warnings of every process, rows that are written twice, and activations that stay."""
    assert together.others == ""
    assert together.said["sparsegpt"].count("block   1/3") == 1
    [run] = (together.runs / "sparsegpt").glob("tiny-*")
    assert not list(run.rglob("*.activations"))
    assert not list(run.rglob("*.part"))
    tracked = (run / "metrics.jsonl").read_text().splitlines()
    assert sum('"block/index": 0' in line for line in tracked) == 1
    assert "nothing to do" in together.said["again"]


def test_a_killed_process_ends_the_run_and_the_command_goes_on(together: Together) -> None:
    """Catches a run that waits for the dead for ever, says nothing readable, or ends elsewhere once it goes on."""
    code, said, status = together.killed
    assert code != 0
    assert status["state"] in {"failed", "interrupted"}, said
    assert "the same command goes on from the last finished window" in said
    assert "going on after" in together.said["resumed"]
    folders = [next((together.runs / name).glob("tiny-*")) for name in ("killed", "undisturbed")]
    assert state_bytes(folders[0]) == state_bytes(folders[1])
    rows = [(folder / "blocks.jsonl").read_text().splitlines() for folder in folders]
    assert [json.loads(row)["after"] for row in rows[0]] == [json.loads(row)["after"] for row in rows[1]]


def test_what_fails_elsewhere_is_said_once_by_the_first(together: Together) -> None:
    """Catches a failure that hides behind a broken connection, and one that leaves the folder as running."""
    assert "code 1" in together.said["error"]
    assert together.said["error"].count("\nfailed: process 1 of 2") == 1
    assert "no luck" in together.said["error"]
    assert "Traceback" not in together.said["error"]
    [run] = (together.runs / "error").glob("tiny-*")
    assert "no luck" in read_json(run / "status.json")["error"]
    assert "ZeroDivisionError: a defect" in together.said["defect"], "a defect keeps its trace"


def test_what_several_processes_cannot_do_is_refused(together: Together) -> None:
    """Catches a sweep that every process launches, a dry run that writes, and processes that share no files."""
    assert "a sweep is launched without torchrun" in together.said["sweep"]
    assert "code 2" in together.said["sweep"]
    assert not (together.runs / "sweep").exists()
    assert "code 0" in together.said["dry"]
    assert "activations in files" in together.said["dry"]
    assert not (together.runs / "dry").exists()
    assert "on one machine" in together.said["elsewhere"]
    assert "code 2" in together.said["elsewhere"]


def test_independent_windows_alone_are_spread() -> None:
    """Catches windows that are spread though one reads what another left, and those that could be and are not."""
    several = Ranks(0, 2)
    assert spreads(preset("free_lunch"), 1, None, several)
    assert spreads(preset("free_lunch", window=2, stride=2), 1, None, several)
    assert not spreads(preset("free_lunch"), 1, None, ALONE)
    assert not spreads(preset("free_lunch"), 1, "0.q and 1.q", several)
    assert not spreads(preset("free_lunch"), 2, None, several), (
        "a later round is chosen on what the first one left"
    )
    for reads in ("input_chain", "target_chain", "statistics_chain"):
        assert not spreads(preset("free_lunch", **{reads: "sparse"}), 1, None, several)
    assert not spreads(preset("free_lunch", window=2), 1, None, several)
    assert not spreads(preset("free_lunch", window=None, stride=None), 1, None, several)
    assert not spreads(preset("free_lunch", granularity="submodule"), 1, None, several)
    assert not spreads(preset("free_lunch", within_block="sequential"), 1, None, several)
    assert not spreads(preset("br_gp_cr"), 1, None, several)


def test_each_process_trains_its_own_windows(together: Together) -> None:
    """Catches windows that are shared after all, and those that go on in the wrong process."""
    trained = {
        name: [
            json.loads(line)["training"][0].get("process")
            for line in (run / "blocks.jsonl").read_text().splitlines()
        ]
        for name in ("independent", "going_on")
        for run in (together.runs / name).glob("tiny-*")
    }
    assert trained == {"independent": [0, 1, 0], "going_on": [None, None, None, 0]}


def test_shares_are_parts_of_the_whole() -> None:
    """Catches items that nobody or two have, and a first process with less than the others."""
    for num_items in range(12):
        for count in range(1, 6):
            shares = [Ranks(number, count).share(num_items) for number in range(count)]
            assert [item for share in shares for item in share] == list(range(num_items))
            sizes = [len(share) for share in shares]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] - sizes[-1] <= 1


def test_what_any_process_saw_apart_is_apart() -> None:
    """Catches an expert that only one process called, and inputs that were the same by chance in one of them."""
    first = {"q": "q", "k": "q", "down": "down"}
    second = {"q": "q", "k": "q", "down": "q", "gate": "gate", "up": "gate"}
    assert groups_of([first, {}, second]) == [["q", "k"], ["down"], ["gate", "up"]]


@pytest.mark.parametrize("token_weight", ["uniform", "inverse_energy", "capped_energy", "language", "packed"])
def test_masses_make_the_whole_of_its_parts(make_model: MakeModel, tmp_path: Path, token_weight: str) -> None:
    """Catches means of parts that count alike whatever their size and their weights."""
    model, text = make_model(), random_text("mask")
    objective: Objective
    if token_weight == "packed":
        places = [
            [*range(split), *range(text.tokens_NT.shape[1] - split)]
            for split in range(1, len(text.tokens_NT) + 1)
        ]
        objective = LanguageObjective(model, text.tokens_NT, torch.tensor(places))
    elif token_weight == "language":
        objective = LanguageObjective(model, text.tokens_NT)
    else:
        store = Chains(model, [text], Stores(model.plan.dtype, 32, tmp_path, on_disk=False)).dense[0][
            text.key
        ]
        objective = WindowObjective(model, range(1), Pairs([store], [store]), "mse", token_weight)
    samples = list(range(5))
    parts = [samples[:2], samples[2:]]
    whole = objective.loss(samples, lambda block: {})
    made_up = sum(float(objective.loss(part, lambda block: {})) * objective.mass(part) for part in parts)
    assert made_up / objective.mass(samples) == pytest.approx(float(whole), rel=1e-5)
    assert objective.mass([]) == 0


class _Other(Ranks):
    """The first of two processes; the other's tensors are given, a list for each sum."""

    def __init__(self, *theirs: list[Tensor]) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "theirs", list(theirs))

    def sum_(self, tensors: Any) -> None:
        for mine, its in zip(tensors, self.theirs.pop(0), strict=True):  # type: ignore[attr-defined]
            mine += its


def test_a_gradient_that_one_process_lacks_is_the_other_s() -> None:
    """Catches an expert that learns where it was called only, and one that nobody called and that moves all the same."""
    both, mine, its, none = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    both.grad, mine.grad = torch.ones(2), torch.ones(2)
    theirs = [torch.ones(2), torch.zeros(2), 3 * torch.ones(2)]
    sum_gradients([both, mine, its, none], _Other([torch.tensor([1.0, 0, 1, 0])], theirs))
    assert [None if it.grad is None else it.grad.tolist() for it in (both, mine, its, none)] == [
        [2, 2], [1, 1], [3, 3], None,
    ]  # fmt: skip


def test_every_process_has_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that all take the first GPU, more of them than GPUs, and as many threads each as one has alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked in ("auto", "cuda"):
        plan = plan_device(asked, "float32", None, None, ranks=Ranks(1, 2))
        assert plan.device == torch.device("cuda:1")
        assert plan.ranks.own_devices
    assert plan_device("cuda:0", "float32", None, None, ranks=Ranks(1, 2)).device == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="3 processes share a run and there are 2 GPUs"):
        plan_device("auto", "float32", None, None, ranks=Ranks(1, 3))
    monkeypatch.setattr(device.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert plan_device("cpu", "float32", None, None, ranks=Ranks(1, 4)).num_threads == 1
    assert plan_device("cpu", "float32", None, None, ranks=Ranks(1, 2)).num_threads == 3
    assert plan_device("cpu", "float32", None, 5, ranks=Ranks(1, 2)).num_threads == 5
    assert plan_device("cpu", "float32", None, None, ranks=ALONE).num_threads == device.DEFAULT_THREADS
