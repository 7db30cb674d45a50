"""Drop the blocks that turn what goes through them least (ShortGPT)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from reprune.calibration.roles import Texts
from reprune.engine.dense_pass import DensePass
from reprune.errors import ConfigError, require_positive
from reprune.evaluation.suite import SuiteEntry
from reprune.files import read_json, write_json
from reprune.model.checkpoint import ModelSource
from reprune.model.linears import linears_of
from reprune.model.loading import LoadedModel
from reprune.model.shortening import remove_blocks, renumbering, shortened
from reprune.pruning.magnitude import Magnitude
from reprune.sparsity.allocation import Layers
from reprune.sparsity.patterns import Unstructured
from reprune.sparsity.similarity import block_means
from reprune.transform.contract import RECORD, Surroundings, Wanted

LOG = logging.getLogger("reprune")


@dataclass(kw_only=True)
class BlockDrop:
    """Drops `count` blocks with the lowest Block Influence, or those that are named in `blocks`; exactly one of both.

    BI_l = 1 − mean over tokens of cos(h_l, h_{l+1}), h_l what enters block l of the dense model (arXiv 2403.03853, eq. 1),
    on the mask data, all blocks measured once before any is dropped; of equal ones the first goes. The blocks that stay
    are numbered anew from 0, and every name of a layer, `target_blocks` and windows are by these numbers.

    The paper removes whole blocks after training and does nothing else; here the model that is left may be pruned, and
    is then the dense model of its reconstruction: the errors of a run are against it, not against the model with all
    blocks. `pruner=none` drops only.

    RECORD holds `dropped` and `influence`, both by the dense model's numbers, and `parameters` before and after.
    """

    count: int | None = None
    blocks: list[int] | None = None

    renumbers: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.count is None) == (self.blocks is None):
            given = "neither" if self.count is None else "both"
            raise ConfigError(
                "count", f"how many blocks go, or which: {given} is given", accepted="count or blocks, the other null",
                hint="transform.count=N, or 'transform.blocks=[…]'",
            )  # fmt: skip
        require_positive(count=self.count)
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            raise ConfigError(
                "blocks", "names no block, or one twice", value=self.blocks, accepted="distinct numbers"
            )

    def identity(self) -> dict[str, Any]:
        """What makes it this choice: named blocks in any order are the same."""
        return {"count": self.count} if self.blocks is None else {"blocks": sorted(self.blocks)}

    def identity_beside(self, suite: Sequence[SuiteEntry]) -> dict[str, Any]:
        """See Transform: nothing."""
        return {}

    def outline(self, source: ModelSource, model: Any, blocks: nn.ModuleList) -> None:
        """See Transform. With `count`, which blocks go is not known yet, and the last ones stand for them."""
        num_blocks = len(blocks)
        if self.blocks is not None:
            wrong = [block for block in self.blocks if not 0 <= block < num_blocks]
            if wrong or len(self.blocks) == num_blocks:
                raise ConfigError(
                    "blocks", f"the model has {num_blocks} blocks, of which one has to stay", value=self.blocks,
                    accepted=f"numbers from 0 to {num_blocks - 1}",
                )  # fmt: skip
            kept = [block for block in range(num_blocks) if block not in self.blocks]
            renumbering(source, model, blocks, kept)
        else:
            assert self.count is not None
            if self.count >= num_blocks:
                raise ConfigError(
                    "count", f"the model has {num_blocks} blocks, of which one has to stay", value=self.count,
                    accepted=f"at most {num_blocks - 1}",
                )  # fmt: skip
            _check_alike(blocks)
            kept = list(range(num_blocks - self.count))
            # Every block that can stay, by the largest change of its number.
            for left in (kept, list(range(self.count, num_blocks))):
                renumbering(source, model, blocks, left)
        remove_blocks(blocks, kept)

    def apply(self, model: LoadedModel, around: Surroundings) -> LoadedModel:
        """See Transform."""
        file = around.folder / RECORD
        before = _num_parameters(model)
        if not file.is_file():
            influence = _influence(model, around)
            dropped = sorted(self.blocks) if self.blocks is not None else self._lowest(influence)
            facts: dict[str, Any] = {"dropped": dropped, "influence": influence}
        else:
            facts = read_json(file)
        gone: list[int] = facts["dropped"]
        kept = [block for block in range(len(model.blocks)) if block not in gone]
        left = shortened(model, around.source, kept, around.texts.mask[0].tokens_NT)
        if not file.is_file() and model.plan.ranks.first:
            write_json(file, {**facts, "parameters": {"before": before, "after": _num_parameters(left)}})
        LOG.info(
            "dropped %d of %d blocks: %s (influence %s)",
            len(gone),
            len(gone) + len(kept),
            ", ".join(map(str, gone)),
            ", ".join(f"{facts['influence'][block]:.3g}" for block in gone),
        )
        return left

    def _lowest(self, influence: Sequence[float]) -> list[int]:
        ranked = sorted(range(len(influence)), key=lambda block: (influence[block], block))
        return sorted(ranked[: self.count])

    def made_for(self, wanted: Wanted, model: LoadedModel, folder: Path) -> LoadedModel:
        """See Transform: what is left is what is evaluated and exported."""
        return model

    def reopened(self, model: LoadedModel, folder: Path) -> LoadedModel:
        """See Transform: it knows again which block of the dense model each of its own was."""
        facts = read_json(folder / RECORD)
        numbers = range(len(facts["influence"]))
        return replace(model, dense_numbers=[block for block in numbers if block not in facts["dropped"]])


def _influence(model: LoadedModel, around: Surroundings) -> list[float]:
    """Block Influence of every block of the dense model."""
    shapes = {
        f"{block}.{name}": view.shape for block, own in enumerate(model.linears) for name, view in own.items()
    }
    # A view has a method and a pattern, which a mean over tokens does not ask for.
    unread: Any = Magnitude()
    texts = Texts(mask=around.texts.mask)
    view = DensePass(model, texts, Layers(shapes), unread, Unstructured(), around.stores, seed=0)
    found = block_means(view, lambda cosine: 1 - cosine)
    return [found[block] for block in range(len(model.blocks))]


def _num_parameters(model: LoadedModel) -> int:
    return sum(parameter.numel() for parameter in model.model.parameters())


def _check_alike(blocks: nn.ModuleList) -> None:
    """ConfigError where blocks differ in their linear layers: which names there will be is not known before measuring."""
    first, *others = [
        {name: (view.shape, view.transposed) for name, view in linears_of(block).items()} for block in blocks
    ]
    for number, other in enumerate(others, start=1):
        if other != first:
            raise ConfigError(
                "count", f"block {number} has other layers than block 0, and which of them go is only known when they "
                "are measured", accepted="null, with the blocks named",
                hint="transform.count=null 'transform.blocks=[…]'; the influence of every block is in the transform.json of any such run",
            )  # fmt: skip
