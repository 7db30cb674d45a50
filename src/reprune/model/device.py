"""The device plan: the one place that knows devices, dtypes and how much work goes through at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from reprune.errors import ConfigError, did_you_mean, require_positive
from reprune.ranks import ALONE, Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_THREADS = torch.get_num_threads()
LONG, SAMPLE = 2**14, 2**12
"""From how many values on a sample of them is worth its while, and of how many it is."""
GOLDEN = (5**0.5 - 1) / 2
Values = np.ndarray[tuple[int], np.dtype[np.float32]]
TOKENS_A_PASS = {"cpu": 2048, "cuda": 32768, "mps": 8192}


@dataclass(frozen=True)
class DevicePlan:
    """Where blocks compute and in what dtype, and how much memory they may take there, in bytes.

    `ranks` are the processes that share the work.
    """

    device: torch.device
    dtype: torch.dtype
    num_threads: int
    ranks: Ranks = field(default=ALONE, compare=False)
    memory_limit: int | None = None

    def below(self, memory_limit: int | None) -> DevicePlan:
        """The same plan with a cap on the device's memory, in bytes; None for none."""
        return replace(self, memory_limit=memory_limit)

    @property
    def kind(self) -> str:
        """'cpu', 'cuda' or 'mps'."""
        return self.device.type

    @property
    def name(self) -> str:
        """The device in words."""
        if self.kind == "cuda":
            return str(torch.cuda.get_device_name(self.device))
        return f"{self.kind}, {self.num_threads} threads"

    @property
    def visible(self) -> str | None:
        """The GPUs that whatever launched this process left to it, by their numbers; None where nothing chose."""
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def settle(self) -> None:
        """Make this process compute as the plan says: its threads, full float32 products."""
        # Only where it differs: setting threads again makes small operations crawl.
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)
        if self.ranks.several and self.kind == "cuda":
            torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("highest")
        if self.kind == "cuda" and self.memory_limit is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.memory_limit / total), self.device)

    def sequences_a_pass(self, length: int) -> int:
        """How many sequences of `length` tokens go through a block at once."""
        return max(1, TOKENS_A_PASS[self.kind] // length)

    @contextmanager
    def holding(self, *modules: nn.Module) -> Iterator[None]:
        """Keep `modules` on the device for the time of the context; those that are there already stay afterwards."""
        if self.kind == "cpu":
            yield
            return
        moved = [module for module in modules if not self._has(module)]
        try:
            for module in moved:
                module.to(self.device)
            yield
        finally:
            for module in moved:
                module.to("cpu")

    def _has(self, module: nn.Module) -> bool:
        """Whether all of a module rests on the device."""
        return all(tensor.device == self.device for tensor in (*module.parameters(), *module.buffers()))

    def put(self, value: object) -> object:
        """Move the tensors of a nest of tuples, lists and dicts to the device."""
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, tuple | list):
            return type(value)(self.put(item) for item in value)
        if isinstance(value, dict):
            return {key: self.put(item) for key, item in value.items()}
        return value

    def synchronise(self) -> None:
        """Wait for the device, so that seconds are charged to the stage that spent them."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        """Start a new high-water mark of device memory."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """High-water mark of device memory since `reset_peak`; None where the device is the host."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.kind == "cuda" else None


def kth_lowest(rows: Tensor, k: int) -> Tensor:
    """The k-th lowest value of each of `rows` [number, n], k from 1: [number, 1]."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.kthvalue(k, dim=1, keepdim=True).values
    # The same number in half the time, in an eighth or so where rows are long.
    if rows.shape[1] < LONG:
        return torch.from_numpy(np.partition(rows.numpy(), k - 1, axis=1)[:, k - 1, None])
    found = [_kth_of_many(row, k) for row in rows.numpy()]
    return torch.tensor(found, dtype=rows.dtype).reshape(-1, 1)


def _kth_of_many(values: Values, k: int) -> float:
    """The k-th lowest, looked for between two quantiles of a sample; among all where it does not lie there."""
    left, between = narrowed(values, k)
    return float(np.partition(between, left - 1)[left - 1])


def narrowed(values: Values, k: int) -> tuple[int, Values]:
    """Some of `values` [n], and the place from 1 that the k-th lowest of all has among them; all where that fails."""
    # Spread evenly, whatever the length of the rows that these values were.
    places = np.arange(SAMPLE) * GOLDEN % 1 * len(values)
    sample = np.sort(values[places.astype(np.int64)])
    # Three standard deviations of a sample's median.
    place, around = k / len(values) * len(sample), 1.5 * len(sample) ** 0.5
    least, most = (sample[min(max(0, round(place + side)), len(sample) - 1)] for side in (-around, around))
    left = k - int(np.count_nonzero(values < least))
    between = values[(values >= least) & (values <= most)]
    return (left, between) if 1 <= left <= len(between) else (k, values)


def release_memory() -> None:
    """Give back the device memory that no tensor holds any more, after a pass that did not fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def exchange_backend() -> str:
    """What processes exchange tensors with, for each kind of device there is: gloo in host memory, NCCL between GPUs."""
    between_gpus = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if between_gpus else "gloo"


def plan_device(
    device: str,
    dtype: str,
    checkpoint_dtype: torch.dtype | None,
    threads: int | None,
    *,
    here: bool = True,
    ranks: Ranks = ALONE,
) -> DevicePlan:
    """Resolve `device=auto|cpu|cuda|cuda:N|mps` and `dtype=auto|float32|bfloat16|float16`.

    auto takes the first CUDA device, else the CPU; float32 on a CPU, the checkpoint's dtype elsewhere. Of several
    processes each takes the CUDA device of its own number with auto or cuda, and without `threads` its part of the cores.
    Raises ConfigError for a device or dtype that is unknown or, where the plan is for `here`, not there, and for fewer
    CUDA devices than processes.
    """
    require_positive(threads=threads)
    chosen = _device(device, here)
    if ranks.several:
        chosen, ranks = _one_each(chosen, device, ranks)
        threads = threads or _threads_each(ranks.count)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(
            "dtype",
            "unknown dtype",
            value=dtype,
            accepted=["auto", *DTYPES],
            hint=did_you_mean(dtype, DTYPES),
        )
    if dtype != "auto":
        resolved = DTYPES[dtype]
    elif chosen.type == "cpu" or checkpoint_dtype is None:
        resolved = torch.float32
    else:
        resolved = checkpoint_dtype
    return DevicePlan(chosen, resolved, threads or DEFAULT_THREADS, ranks)


def _one_each(chosen: torch.device, asked: str, ranks: Ranks) -> tuple[torch.device, Ranks]:
    if chosen.type != "cuda" or asked not in ("auto", "cuda"):
        return chosen, ranks
    there = torch.cuda.device_count()
    if ranks.count > there:
        raise ConfigError(
            "device", f"{ranks.count} processes share a run and there are {there} GPUs, one for each is needed",
            value=asked, accepted=f"at most {there} processes, or device=cpu", hint=f"torchrun --nproc-per-node {there} …",
        )  # fmt: skip
    return torch.device("cuda", ranks.number), replace(ranks, own_devices=True)


def _threads_each(num_processes: int) -> int:
    # torchrun sets OMP_NUM_THREADS=1 where nobody has set it, which hides what torch would have taken.
    told = os.environ.get("OMP_NUM_THREADS", "1")
    if told != "1":
        return DEFAULT_THREADS
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    return max(1, cores // num_processes)


def _device(device: str, here: bool) -> torch.device:
    there = ["cpu"]
    there += (
        ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.cuda.is_available()
        else []
    )
    there += ["mps"] if torch.backends.mps.is_available() else []
    if device == "auto":
        return torch.device("cuda:0" if "cuda" in there else "cpu")
    if not here and re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        return torch.device(device)
    if device not in there:
        known = device.split(":")[0] in {"cpu", "cuda", "mps"}
        raise ConfigError(
            "device",
            "this device is not there" if known else "unknown device",
            value=device,
            accepted=["auto", *there],
            hint=None if known else did_you_mean(device, ["auto", *there]),
        )
    return torch.device("cuda:0" if device == "cuda" else device)
