"""What benchmarks that take turns have: seconds by arm, a round each, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import pytest

from reprune.build import build
from reprune.compose import compose_run
from reprune.model.description import load_tokenizer
from reprune.model.device import plan_device
from reprune.model.loading import LoadedModel, load_model

Seconds = dict[str, list[float]]
Measure = Callable[[Callable[[], Any]], Any]


def against(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """By arm the median over rounds of its seconds over those of `base` in the same round."""
    return {
        name: median(own / theirs for own, theirs in zip(took, seconds[base], strict=True))
        for name, took in seconds.items()
    }


def loaded(config: pytest.Config) -> LoadedModel:
    """The model that was asked for, float32."""
    source = build(compose_run([f"model={config.getoption('model')}"]).config["model"], "model")
    plan = plan_device(config.getoption("device"), "float32", None, config.getoption("threads"))
    plan.settle()
    return load_model(source, load_tokenizer(source), plan)
