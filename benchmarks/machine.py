"""The machine that a benchmark ran on, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine(threads: int) -> str:
    """The processor, threads and version in one line."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []  # fmt: skip
    return f"{names[0] if names else platform.processor()}, {threads} threads, torch {torch.__version__}"
