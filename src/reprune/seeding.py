"""Named random streams: what is drawn depends on a seed and a purpose, never on what was drawn before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose of one run seed."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of its own for (seed, purpose)."""
    # Only here: reports draw seeds and need no torch, which takes seconds to import.
    import torch

    made = torch.Generator()
    made.manual_seed(seed_for(seed, *purpose))
    return made
