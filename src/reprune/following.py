"""What the processes beside the first do of a run: their part of the computing, nothing of the writing."""

from __future__ import annotations

import torch
from safetensors import SafetensorError

from reprune.kept_texts import check_alike
from reprune.model.loading import load_model
from reprune.pipeline import block_loop, explained, stores_of, transformed
from reprune.resources import StageMeter
from reprune.run_plan import RunPlan
from reprune.tracking.progress import ProgressView


def follow(plan: RunPlan) -> None:
    """The run without its text's making, its evaluations, its record: pipeline.run in the first process does those.

    RunError when it cannot go on.
    """
    plan.device.settle()
    if not plan.device.ranks.tell(None):
        plan.device.ranks.part()
        return
    try:
        _follow(plan)
    except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
        raise explained(error, plan) from error


def _follow(plan: RunPlan) -> None:
    meter = StageMeter(plan.device)
    model = load_model(plan.source, plan.tokenizer, plan.device, on_disk=plan.memory.weights == "disk")
    # What the model writes lies in the cache once the first process has its texts.
    plan.device.ranks.wait()
    texts = plan.texts(model)
    check_alike(texts, plan.device.ranks)
    stores = stores_of(plan)
    model = transformed(plan, model, texts, stores, meter)
    block_loop(plan, model, texts, stores, meter, ProgressView(), lambda windows, rows, new: None).run()
    plan.device.ranks.part()
