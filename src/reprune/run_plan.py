"""A run that was checked: what is known of it before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reprune.calibration.corpora import CorpusSource
from reprune.calibration.gather import Request, cut_all
from reprune.calibration.overlap import run_length
from reprune.calibration.roles import Texts, check_roles
from reprune.calibration.splits import common_runs
from reprune.compose import Composed
from reprune.engine.windows import windows_over
from reprune.evaluation.suite import SuiteEntry
from reprune.files import sha256_of_json
from reprune.memory import MemoryPlan
from reprune.model.checkpoint import ModelSource
from reprune.model.device import DevicePlan
from reprune.pruning.contract import Needs, Pruner
from reprune.pruning.refinement import Refinement, needs_of
from reprune.reconstruction.objective import check_lengths
from reprune.reconstruction.technique import Technique
from reprune.run_folder import RunFolder
from reprune.shapes import Shapes
from reprune.sparsity.allocation import ModelAllocation, SizeAllocation
from reprune.sparsity.patterns import Pattern
from reprune.sparsity.schedule import Schedule
from reprune.tracking.contract import Tracking
from reprune.transform.contract import Transform


@dataclass(frozen=True)
class RunPlan:
    """A run that was checked: every object built, every text cut that needs no model, sizes known.

    `steps` are the schedule's sparsities, `rounds` what the allocation makes of them by layer: None where it reads the model.
    """

    composed: Composed
    source: ModelSource
    tokenizer: Any
    device: DevicePlan
    shapes: Shapes
    transform: Transform
    pruner: Pruner
    pattern: Pattern
    sparsity: float
    steps: list[float]
    rounds: list[dict[str, float]] | None
    allocation: SizeAllocation | ModelAllocation
    refinement: Refinement | None
    schedule: Schedule
    technique: Technique
    requests: list[Request]
    suite: list[SuiteEntry]
    tracking: Tracking
    folder: RunFolder
    identity: dict[str, Any]
    seed_data: int
    seed_training: int
    memory: MemoryPlan

    @property
    def alike(self) -> str:
        """Hash of what the run is on whatever device."""
        return sha256_of_json(
            {name: it for name, it in self.identity.items() if name not in ("dtype", "device")}
        )

    @property
    def needs(self) -> Needs:
        """What the pruner and the refinement read."""
        return needs_of(self.pruner, self.refinement)

    @property
    def num_windows(self) -> int:
        """Windows over blocks."""
        technique = self.technique
        return len(windows_over(self.shapes.num_blocks, technique.window, technique.stride))

    @property
    def config(self) -> dict[str, Any]:
        """The composed config as plain data."""
        return self.composed.config

    def texts(self, model: Any) -> Texts:
        """All texts of the run; those that the model writes need it."""
        texts, _ = cut_all(self.requests, self.tokenizer, model, self.seed_data)
        self.check_texts(texts)
        return texts

    def check_texts(self, texts: Texts) -> dict[str, float]:
        """Roles and overlap; see calibration.roles."""
        evaluation = {
            f"{entry.name}.{name}": text for entry in self.suite for name, text in entry.texts.items()
        }
        # A continued text is as common as the prefixes that it begins with.
        sources = [(getattr(it.source, "prefixes", it.source), it.key) for it in self.requests]
        corpora = [source.corpus(key) for source, key in sources if isinstance(source, CorpusSource)]
        common = common_runs(self.tokenizer, corpora)
        check_lengths([text.tokens_NT.shape[1] for text in texts.reconstruction])
        most = 1.0 if self.config["allow_overlap"] else self.config["max_overlap"]
        return check_roles(texts, evaluation, common, run_length(self.tokenizer), most)
