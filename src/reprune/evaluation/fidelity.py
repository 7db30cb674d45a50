"""How far the pruned model is from the dense one: in what it predicts, and in its hidden states by depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor

from reprune.calibration.source import TextSet
from reprune.engine.activations import Activations, compare
from reprune.errors import RunError, require_nonnegative
from reprune.evaluation.batches import attempt, in_batches
from reprune.evaluation.bootstrap import LEVEL, RESAMPLES, noise_of_ratio
from reprune.evaluation.contract import Outcome, Task
from reprune.evaluation.perplexity import window_frame, write_frame
from reprune.evaluation.texts import OnTexts, origins_of, scored_of, units_of
from reprune.model.head import final_hidden, head_hash, head_logits, in_chunks, states_by_depth
from reprune.model.likelihood import rows_a_pass
from reprune.model.loading import LoadedModel
from reprune.tensor_files import write_tensors

FINAL = "final"
COUNTED = ("kl", "top1_agreement", "lost", "gained")


@dataclass(kw_only=True)
class Fidelity(OnTexts):
    """Dense against pruned model on the windows that Perplexity would cut, a scored token at a time.

    - `fidelity/TEXT/kl`: KL(dense ‖ pruned) of the next token's distribution, nats, mean over tokens;
    - `fidelity/TEXT/top1_agreement`: share of tokens with the same most likely one;
    - `fidelity/TEXT/lost`, `/gained`: share of tokens of which the dense model's most likely one was right and the
      pruned model's is not, and the other way round;
    - `fidelity/TEXT/hidden_error/DEPTH`, `/hidden_relative/DEPTH`: errᵢ of arXiv 2406.15524, §3, and its relative twin
      (see engine.activations.compare) behind block DEPTH (from 0), and at `final`, behind the final norm; over the first
      `depth_windows` windows (0: none), filled-up tokens left out. Of a run that dropped blocks each one that stayed is
      held against itself in the dense model, under its number there; a model from elsewhere with fewer blocks has `final`
      alone, which a note says;
    - `fidelity_evaluation_noise/TEXT/NAME`: standard errors of the first four, of a bootstrap over windows (by document:
      over documents).

    The dense model has none of them: of it, its states are kept, in the model's dtype: TEXT.safetensors with `final`
    [windows, tokens − 1, hidden] and, of the first windows, `depth.DEPTH` [windows, tokens, hidden]. Logits of both
    are made from hidden states, some positions at a time, so that never two models are in memory. They are made by the
    head of the model at hand: nothing here changes what lies outside the blocks, and a second head on disk would be the
    largest tensor of many models (1 GB in bfloat16 for 128k tokens × 4,096). A hash of the head lies with the states
    instead, and a model with another head, which only one from elsewhere can have, is refused.

    `windows_TEXT.parquet` keeps a row a window: `window`, `document` where it is one of a document, `tokens`, and the sums
    over them of `kl`, `top1_agreement`, `lost`, `gained`.
    """

    depth_windows: int = 4

    needs_dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(depth_windows=self.depth_windows)

    def identity(self, texts: Mapping[str, TextSet]) -> dict[str, Any]:
        """See Evaluator."""
        return {
            "evaluator": "fidelity",
            "texts": {name: text.key for name, text in texts.items()},
            "depth_windows": self.depth_windows,
            "bootstrap": [RESAMPLES, LEVEL],
        }

    def evaluate(self, task: Task) -> Outcome:
        """See Evaluator. A text on which a model is not finite has failed; RunError when all have.

        RunError as well for a model whose head is not the dense one's.
        """
        outcome, counted = Outcome({}, notes=origins_of(task.texts)), _Progress(task)
        with task.model.holding(task.model.model):
            head = head_hash(task.model)
            for name, text in task.texts.items():
                file = f"{name}.safetensors"
                if task.dense is None:
                    if not _keep_states(task, name, text, self.depth_windows, head, outcome.notes, counted):
                        outcome.failed[f"fidelity/{name}"] = f"the model's states on '{name}' are not finite"
                    continue
                if not (task.dense / file).is_file():
                    outcome.failed[f"fidelity/{name}"] = (
                        f"the dense model's states on '{name}' are not finite"
                    )
                    continue
                with safe_open(task.dense / file, framework="pt") as dense:
                    _check_head(dense.metadata()["head"], head, task.model)
                    windows = _compared(task, name, text, dense, outcome.notes, counted)
                    depths = _depth_errors(task.model, text, dense, self.depth_windows, outcome.notes)
                self._add(outcome, task.folder, name, text, windows, depths)
        if outcome.failed and not outcome.metrics and task.dense is not None:
            raise RunError("; ".join(outcome.failed.values()))
        return outcome

    def _add(
        self,
        outcome: Outcome,
        folder: Path,
        name: str,
        text: TextSet,
        windows: pd.DataFrame,
        depths: Mapping[str, Mapping[str, float]],
    ) -> None:
        """The metrics of one text, or that it failed."""
        # pandas would sum over what is not a number.
        found = {measure: windows[measure].to_numpy().sum() / windows["tokens"].sum() for measure in COUNTED}
        found |= {
            f"hidden_{kind}/{depth}": errors[kind] for depth, errors in depths.items() for kind in errors
        }
        broken = [measure for measure, value in found.items() if not math.isfinite(value)]
        if broken:
            outcome.failed[f"fidelity/{name}"] = f"{broken[0]} is not finite on '{name}'"
            return
        write_frame(folder / f"windows_{name}.parquet", windows)
        outcome.metrics.update({f"fidelity/{name}/{measure}": float(it) for measure, it in found.items()})
        units = windows.groupby(units_of(text).numpy())[["tokens", *COUNTED]].sum()
        for measure in COUNTED:
            noise = noise_of_ratio(units[measure].to_numpy(), units["tokens"].to_numpy())
            if noise is not None:
                label = f"fidelity_evaluation_noise/{name}/{measure}"
                outcome.metrics[label] = noise.standard_error


class _Progress:
    """Windows that are through, over all texts."""

    def __init__(self, task: Task) -> None:
        self.done = 0
        self.total = sum(len(text.tokens_NT) for text in task.texts.values())
        self.told = task.on_progress

    def add(self, where: slice) -> None:
        self.done += where.stop - where.start
        self.told(self.done, self.total)


def _check_head(dense: str, own: str, model: LoadedModel) -> None:
    if dense != own:
        raise RunError(
            f"{model.name}: its head (all that lies behind the final norm, and the output embedding) is not the dense "
            "model's, so that the dense predictions cannot be made with it; fidelity compares models that differ in "
            "their blocks"
        )


@torch.no_grad()
def _keep_states(
    task: Task, name: str, text: TextSet, num_deep: int, head: str, notes: list[str], progress: _Progress
) -> bool:
    """Write the dense states of a text, if they are finite; whether they are."""
    model, tokens_NT = task.model, text.tokens_NT
    finals = []
    size = rows_a_pass(model, tokens_NT.shape[1])
    for where, hidden in in_batches(
        tokens_NT, size, lambda rows: final_hidden(model, rows)[:, :-1].cpu(), notes, f"fidelity on '{name}'"
    ):
        finals.append(hidden)
        progress.add(where)
    tensors = {FINAL: torch.cat(finals)}
    deep = [_by_depth(model, row, name) for row in tokens_NT[:num_deep]]
    tensors |= {f"{depth}": torch.cat(states) for depth, states in zip(_depths(model), zip(*deep, strict=True), strict=False)}  # fmt: skip
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    if finite:
        write_tensors(task.folder / f"{name}.safetensors", tensors, {"head": head})
    return finite


def _by_depth(model: LoadedModel, row: Tensor, name: str) -> list[Tensor]:
    """What every block and the final norm put out for one row, on the host."""
    made = attempt(lambda: [state.cpu() for state in states_by_depth(model, row[None])])
    if made is None:
        raise RunError(
            f"fidelity on '{name}': the device is out of memory with the states behind every block of one window; "
            "set evaluation.fidelity.depth_windows=0 or shorten the windows"
        )
    return made[0]


def _depths(model: LoadedModel) -> list[str]:
    """Names of the states that `states_by_depth` gives: by the blocks' numbers in the dense model."""
    numbers = range(len(model.blocks)) if model.dense_numbers is None else model.dense_numbers
    return [*(f"depth.{number}" for number in numbers), f"depth.{FINAL}"]


@torch.no_grad()
def _compared(
    task: Task, name: str, text: TextSet, dense: Any, notes: list[str], progress: _Progress
) -> pd.DataFrame:
    """A row a window: what is summed over its scored tokens."""
    model, stored, scored_NT = task.model, dense.get_slice(FINAL), scored_of(text)

    def run(places: Tensor) -> Tensor:
        start, end = int(places[0]), int(places[-1]) + 1
        counts = scored_NT[start:end]
        hidden = final_hidden(model, text.tokens_NT[start:end])[:, :-1][counts.to(model.plan.device)]
        targets = text.tokens_NT[start:end, 1:][counts]
        measured = torch.zeros(*counts.shape, len(COUNTED), dtype=torch.float64)
        measured[counts] = _measures(model, stored[start:end][counts], hidden, targets)
        return measured.sum(dim=1)

    sums = []
    size = rows_a_pass(model, text.tokens_NT.shape[1])
    for where, found in in_batches(
        torch.arange(len(text.tokens_NT)), size, run, notes, f"fidelity on '{name}'"
    ):
        sums.append(found)
        progress.add(where)
    return window_frame(text, dict(zip(COUNTED, torch.cat(sums).T.numpy(), strict=True)))


def _measures(model: LoadedModel, dense: Tensor, pruned: Tensor, targets: Tensor) -> Tensor:
    """COUNTED of every position, float64 [positions, 4] on the host, from final hidden states [positions, hidden]."""
    parts = []
    for where in in_chunks(model, len(targets), copies=2):
        told = torch.log_softmax(head_logits(model, dense[where]).float(), dim=-1)
        tells = torch.log_softmax(head_logits(model, pruned[where]).float(), dim=-1)
        # Where the dense model gives no chance at all, log 0 counts for nothing.
        odds = told.exp()
        divergence = (odds * (told - tells)).where(odds > 0, 0).sum(dim=-1)
        right = targets[where].to(told.device)
        first, second = told.argmax(dim=-1), tells.argmax(dim=-1)
        was, is_ = first == right, second == right
        parts.append(
            torch.stack([divergence, first == second, was & ~is_, ~was & is_], dim=-1).double().cpu()
        )
    return torch.cat(parts)


@torch.no_grad()
def _depth_errors(
    model: LoadedModel, text: TextSet, dense: Any, num_deep: int, notes: list[str]
) -> dict[str, dict[str, float]]:
    """Errors behind every block and the final norm, over the first windows: by depth."""
    rows = text.tokens_NT[:num_deep]
    if not len(rows):
        return {}
    # What fills a window up stands behind the last scored token.
    behind = scored_of(text)[:num_deep].flip(1).cumsum(dim=1).flip(1) > 0
    there = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), behind], dim=1)
    found: dict[str, list[Tensor]] = {name: [] for name in _depths(model)}
    for row, kept in zip(rows, there, strict=True):
        for name, state in zip(found, _by_depth(model, row, text.name), strict=True):
            found[name].append(state[0][kept])
    num_dense = sum(name.startswith("depth.") for name in dense.keys()) - 1  # noqa: SIM118 (no dict)
    if model.dense_numbers is None and num_dense != len(model.blocks):
        notes.append(
            f"fidelity on '{text.name}': {len(model.blocks)} blocks beside {num_dense} of the dense model, so that no "
            "error is by block"
        )
        found = {name: states for name, states in found.items() if name == f"depth.{FINAL}"}
    return {
        name.removeprefix("depth."): compare(
            _stored(dense.get_tensor(name)[there]), _stored(torch.cat(states))
        )
        for name, states in found.items()
    }


def _stored(states: Tensor) -> Activations:
    """States [tokens, hidden] as one sequence."""
    made = Activations((1, *states.shape), states.dtype, None)
    made.write(slice(0, 1), states[None])
    return made
