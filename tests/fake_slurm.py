"""A queue of one machine that speaks as Slurm does: sbatch, srun, scontrol, sacct. It runs what it is given.

Installed under those names in a folder of the path; what it was asked lies in $FAKE_SLURM.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOM = Path(os.environ["FAKE_SLURM"])
FIRST_JOB = 100


def log(entry: dict[str, object]) -> None:
    with (ROOM / "asked.jsonl").open("a") as stream:
        stream.write(json.dumps(entry) + "\n")


def start(job: str, script: str) -> None:
    """Run one task of the array in the background, as a node would."""
    array, _, task = job.partition("_")
    environment = {
        **os.environ,
        "SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task,
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "here", "SUBMITIT_EXECUTOR": "slurm",
    }  # fmt: skip
    [command] = [line for line in Path(script).read_text().splitlines() if line.startswith("srun")]
    words = [
        word.replace("%A", array).replace("%a", task).replace("%t", "0") for word in shlex.split(command)
    ]
    place = words.index("--output"), words.index("--error")
    for line in (ROOM / "asked.jsonl").read_text().splitlines():
        # Queued again, it begins when it has ended.
        while json.loads(line).get("started") == job and not over(json.loads(line)["pid"]):
            time.sleep(0.05)
    # Submitit makes the folder of a job after the queue took it.
    room = Path(words[place[0] + 1]).parent
    while not room.is_dir() or not list(room.glob("*.pkl")):
        time.sleep(0.05)
    rest = [
        word for index, word in enumerate(words[1:], 1) if index not in {*place, *(at + 1 for at in place)}
    ]
    while rest[0].startswith("-"):
        rest.pop(0)
    with open(words[place[0] + 1], "a") as out, open(words[place[1] + 1], "a") as err:
        process = subprocess.Popen(rest, env=environment, stdout=out, stderr=err, start_new_session=True)
    log({"started": job, "pid": process.pid, "script": script})


def over(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for has."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def later(job: str, script: str) -> None:
    """As a queue does: take it now, begin it when there is room."""
    command = [sys.executable, __file__, "--begin", job, script]
    subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def main() -> None:
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if arguments[:1] == ["--begin"]:
        start(*arguments[1:])
        return
    log({"command": name, "arguments": arguments})
    if name == "sbatch":
        script = Path(arguments[-1]).read_text()
        (ROOM / "submitted.sh").write_text(script)
        tasks = re.search(r"--array=(\d+)-(\d+)", script)
        for task in range(int(tasks[1]), int(tasks[2]) + 1) if tasks else [0]:
            later(f"{FIRST_JOB}_{task}", arguments[-1])
        print(f"Submitted batch job {FIRST_JOB}")
    elif name == "scontrol":
        assert arguments[0] == "requeue", arguments
        started = [json.loads(line) for line in (ROOM / "asked.jsonl").read_text().splitlines()]
        later(
            arguments[1], next(entry["script"] for entry in started if entry.get("started") == arguments[1])
        )
    elif name == "sacct":
        print("JobID|State|NodeList")


if __name__ == "__main__":
    main()
