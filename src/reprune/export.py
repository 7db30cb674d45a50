"""What a run writes on request beside its record: the masks, the pruned model, a smaller model without its zeros."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reprune.calibration.roles import Texts
from reprune.files import read_json
from reprune.model.agreement import disagreement
from reprune.model.checkpoint import read_weights
from reprune.model.compact import Masks, NotExpressibleError, compact
from reprune.model.loading import LoadedModel
from reprune.run_plan import RunPlan
from reprune.tensor_files import write_tensors

LOG = logging.getLogger("reprune")
_SEQUENCES, _TOKENS = 2, 64


def export(plan: RunPlan, model: LoadedModel, texts: Texts, masks: Masks) -> dict[str, Any]:
    """Write what is asked for and not there yet; what the record says of it: `compact`, or nothing."""
    path, asked = plan.folder.path, plan.config["export"]
    if asked["masks"]:
        tensors = {
            f"{block}.{name}": keep for block, layers in masks.items() for name, keep in layers.items()
        }
        write_tensors(path / "masks" / "masks.safetensors", tensors)
    if asked["model"] and not (path / "model").is_dir():
        partial = path / ".model.part"
        model.save(partial)
        partial.rename(path / "model")
    if asked["compact"] and not _compact_there(plan):
        tokens_BT = texts.mask[0].tokens_NT[:_SEQUENCES, :_TOKENS]
        told = _write_compact(path / "compact", model, masks, tokens_BT, plan.source.trust_remote_code)
        LOG.info("compact %s", _in_words(told, plan.shapes.num_parameters))
        return {"compact": told}
    return {}


def exported(plan: RunPlan) -> bool:
    """Whether a finished run has all exports that are asked for, or says why it cannot have one."""
    path, asked = plan.folder.path, plan.config["export"]
    there = all((path / name).is_dir() for name in ("model", "masks") if asked[name])
    return there and (not asked["compact"] or _compact_there(plan))


def _compact_there(plan: RunPlan) -> bool:
    """Whether a finished run's record speaks of the smaller model, and it lies there unless it could not be written."""
    if not plan.folder.finished:
        return False
    told = read_json(plan.folder.path / "result.json").get("compact")
    return told is not None and (not told["smaller"] or (plan.folder.path / "compact").is_dir())


def _write_compact(
    folder: Path,
    model: LoadedModel,
    masks: Masks,
    tokens_BT: Tensor,
    trusted: bool,
) -> dict[str, Any]:
    """Write the smaller model, once what plain transformers reads puts out the same as the model for `tokens_BT`.

    Returns the submodules that are `smaller`, none where nothing is written; `remarks`, why not or why not all; the
    number of `parameters` of what is written.
    """
    partial = folder.with_name(".compact.part")
    # What a killed process left.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        found = compact(model, masks)
        found.model.save(partial)
        # Its weights are not held while they are read back.
        smaller, remarks = list(found.smaller), list(found.remarks)
        del found
        written = model.with_model(read_weights(partial, model.plan.dtype, trusted))
        differs = disagreement(model, written, tokens_BT)
        if differs is not None:
            raise NotExpressibleError(
                f"{', '.join(smaller)} made smaller, the model does not put out the same: {differs}"
            )
    except (NotExpressibleError, RuntimeError, ValueError, KeyError) as error:
        # After hours of pruning, what libraries make of a smaller model must not end the run. A full disk does.
        shutil.rmtree(partial, ignore_errors=True)
        return {"smaller": [], "remarks": [str(error) or type(error).__name__]}
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    num_parameters = sum(parameter.numel() for parameter in written.model.parameters())
    return {"smaller": smaller, "remarks": remarks, "parameters": num_parameters}


def _in_words(told: Mapping[str, Any], num_parameters: int) -> str:
    remarks = "; ".join(told["remarks"])
    if not told["smaller"]:
        return f"not written: {remarks}"
    size = f"{told['parameters'] / 1e6:,.1f} M of {num_parameters / 1e6:,.1f} M parameters"
    return f"{size}; {remarks}" if remarks else size
