"""Everything offline and small; the tiny models live in a cache of the session, the text stays where it is."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from helpers import make_sweep
from reprune.model import device
from reprune.model.loading import LoadedModel
from support import load_tiny

MakeModel = Callable[..., LoadedModel]

settings.register_profile("small", deadline=None, max_examples=30)
settings.load_profile("small")


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny products crawl where threads wait for each other; progress bars hide failures."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if "real" not in request.keywords:
        monkeypatch.setattr(device, "DEFAULT_THREADS", 1)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny runs flush dozens of files; what a flush is for only a process that dies can show, and those do flush."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this session, for the models that are made."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def own_results(model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in which nothing is found that another test computed; tiny models are made once a session."""
    for kind in model_cache.iterdir():
        if kind.name != "models":
            shutil.rmtree(kind)
    monkeypatch.setenv("REPRUNE_CACHE", str(model_cache))


@pytest.fixture(scope="session")
def make_model(model_cache: Path) -> MakeModel:
    """`load_tiny` with its folders in a cache of this session; every call gives a fresh model."""

    def make(architecture: str = "llama", **choices: Any) -> LoadedModel:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REPRUNE_CACHE", str(model_cache))
            return load_tiny(architecture, **choices)

    return make


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight finished runs, see helpers.make_sweep; not to be written to."""
    return make_sweep(tmp_path_factory.mktemp("sweep"))
