"""One run by several processes that torchrun started on one machine: how they meet, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from reprune import dry_run, ranks
from reprune.compose import command_of, compose_run
from reprune.errors import ConfigError, RunError
from reprune.exit_codes import FAILED, exit_codes
from reprune.job import do
from reprune.memory import MemoryPlan
from reprune.ranks import LeftAloneError, Ranks
from reprune.tracking.progress import configure_logging, quiet_libraries

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from reprune.run_plan import RunPlan

# Longer than any run waits for an evaluation or a text; torchrun ends them all when one dies.
_PATIENCE = timedelta(days=7)
_TOLD = "told"


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def main(arguments: Sequence[str]) -> None:
    """Do the one run that the arguments stand for, as one of its processes. Only the first one says anything."""
    if os.environ["RANK"] == "0":
        _lead(arguments)
    else:
        _follow(arguments)


def _lead(arguments: Sequence[str]) -> None:
    with _leading() as store:
        with exit_codes():
            _check_place()
            mine = _meet(store)
            plan = _planned(arguments, mine)
            dry = plan.config["dry_run"]
            mine.tell(None if dry else [plan.folder.id, asdict(plan.memory)])
        with exit_codes(working=True, interrupted="the same command goes on from the last finished window"):
            if dry:
                mine.part()
                dry_run.show(plan)
            else:
                do(plan)


def _follow(arguments: Sequence[str]) -> None:
    _fall_silent()
    with _following() as store:
        _check_place()
        mine = _meet(store)
        told = mine.tell(None)
        if told is None:
            mine.part()
        else:
            run, memory = told
            from reprune.following import follow

            plan = _planned(arguments, mine)
            if plan.folder.id != run:
                raise RunError(
                    f"it makes another run of the command than the first: {plan.folder.id}, not {run}"
                )
            # What is free differs from moment to moment: what rests where is the first one's choice.
            follow(replace(plan, memory=MemoryPlan(**memory)))


def _planned(arguments: Sequence[str], mine: Ranks) -> RunPlan:
    from reprune.check import check

    flags = [argument for argument in arguments if argument.startswith("-")]
    jobs, multirun = command_of(arguments)
    if multirun:
        raise ConfigError(
            "", "a sweep is launched without torchrun: its jobs are processes of their own already",
            value=" ".join(arguments), accepted="one run",
            hint="the same command without torchrun; launcher=box puts a run on each GPU",
        )  # fmt: skip
    if flags:
        raise ConfigError(
            flags[0], "several processes can do a run and nothing else", accepted="overrides: key=value",
            hint="the same command without torchrun",
        )  # fmt: skip
    configure_logging()
    quiet_libraries()
    return check(compose_run(jobs[0]), ranks=mine)


def _check_place() -> None:
    """ConfigError for processes of several machines: activations are files that all of them have mapped."""
    every, here = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE")
    if here != every:
        raise ConfigError(
            "", "the processes of a run are on one machine", value=f"{every} processes, {here or '?'} of them here",
            accepted="one machine", hint="torchrun --standalone --nproc-per-node N -m reprune …; for many machines a sweep: launcher=ray or slurm",
        )  # fmt: skip


def _store() -> Store:
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://", timeout=_PATIENCE))[0]
    return store


def _meet(store: Store) -> Ranks:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from reprune.model.device import exchange_backend

    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here = next(
        (name for name, its in psutil.net_if_addrs().items() if any(it.address == "127.0.0.1" for it in its)),
        None,
    )
    if here is not None:
        # A host's own name need not lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", here)
    dist.init_process_group(
        exchange_backend(),
        store=PrefixStore("reprune", store),
        rank=number,
        world_size=count,
        timeout=_PATIENCE,
    )
    return Ranks(number, count, store)


@contextmanager
def _leading() -> Iterator[Store]:
    """However it ends: the others, which wait for that where they failed, are let go when all is said."""
    store = _store()
    signal.signal(signal.SIGTERM, _told_to_end)
    try:
        yield store
    except BaseException:
        with suppress(RuntimeError):
            store.compare_set(ranks.FAILED, "", "the first process failed")
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Whoever keeps the store may have ended before.
        with suppress(RuntimeError):
            store.set(_TOLD, "")


def _told_to_end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not by print, which may be what was interrupted.
    os.write(2, b"\ntold to end (SIGTERM), as torchrun does when another process of the run died\n")
    raise KeyboardInterrupt


@contextmanager
def _following() -> Iterator[Store]:
    """What goes wrong here the first process says; this one ends after it, since torchrun then ends them all."""
    store = _store()
    # An interruption is the first process's to tell of.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield store
    except BaseException as error:
        with suppress(RuntimeError):
            if not isinstance(error, LeftAloneError):
                store.compare_set(ranks.FAILED, "", _in_words(error))
            store.wait([_TOLD], _PATIENCE)
        raise SystemExit(FAILED) from None


def _in_words(error: BaseException) -> str:
    place = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}"
    meant = isinstance(error, ConfigError | RunError)
    return f"{place}: {error if meant else ''.join(traceback.format_exception(error))}"


def _fall_silent() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
