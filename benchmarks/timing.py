"""What benchmarks that take turns have: seconds by arm, a round each, and what is made of them."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import psutil
import pytest
import torch

from reprune.build import build
from reprune.compose import compose_run
from reprune.model.description import load_tokenizer
from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel, load_model
from reprune.resources import StageMeter

GLIBC = platform.libc_ver()[0] == "glibc"
M_MMAP_THRESHOLD = -3
Seconds = dict[str, list[float]]
Rows = list[dict[str, Any]]
Measure = Callable[[Callable[[], Any]], Any]


def against(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """By arm the median over rounds of its seconds over those of `base` in the same round."""
    return {
        name: median(own / theirs for own, theirs in zip(took, seconds[base], strict=True))
        for name, took in seconds.items()
    }


def clock_of(config: pytest.Config) -> str:
    """The function that tells the time, with its module."""
    timer = config.option.benchmark_timer
    return str(getattr(timer, "__name__", timer))


def loaded(config: pytest.Config) -> LoadedModel:
    """The model that was asked for, float32."""
    source = build(compose_run([f"model={config.getoption('model')}"]).config["model"], "model")
    plan = plan_device(config.getoption("device"), "float32", None, config.getoption("threads"))
    plan.settle()
    model = load_model(source, load_tokenizer(source), plan)
    # A mapped file is memory only once it is read.
    for parameter in model.model.parameters():
        parameter.sum()
    return model


def with_peak(model: LoadedModel, work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and the bytes it took beyond what lay on the model's device before.

    glibc gives tensors back as they are freed, so that none hides in what an earlier arm had; that is slow, and ends with it.
    """
    _keep_freed_below(2**18)
    try:
        meter, resting = StageMeter(model.plan), _resting_bytes(model)
        with meter.stage("work"):
            found = work()
    finally:
        _keep_freed_below(2**25)
    return found, (meter.device_peak_bytes or meter.peak_bytes)["work"] - resting


def _keep_freed_below(size: int) -> None:
    if GLIBC:
        assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)


def _resting_bytes(model: LoadedModel) -> int:
    if model.plan.kind == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated(model.plan.device))
    if GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)
