"""Weights & Biases as a mirror of the JSONL files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reprune.tracking.contract import RunInfo, Tracker
from reprune.tracking.jsonl import JsonlTracking

LOG = logging.getLogger("reprune")
CONNECT_SECONDS = 8
FINISH_SECONDS = 120


@dataclass(kw_only=True)
class WandbTracking:
    """One W&B run an attempt, grouped by experiment; per-block series on their own step metric `block/index`.

    A server that cannot be reached is no reason to lose a run: it goes on offline and says so.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "reprune"
    entity: str | None = None

    @contextmanager
    def start(self, info: RunInfo) -> Iterator[Tracker]:
        """See Tracking."""
        with JsonlTracking().start(info) as jsonl:
            if self.mode == "disabled":
                yield jsonl
                return
            run = self.open(info.id, info.group, {"reprune_id": info.id, **info.config}, info.folder)
            both = _Both(jsonl, run)
            code = 1
            try:
                both.mirror(lambda: run.define_metric("block/index"))
                both.mirror(lambda: run.define_metric("block/*", step_metric="block/index"))
                yield both
                code = 0
            finally:
                both.mirror(lambda: run.finish(exit_code=code))

    def open(
        self, name: str, group: str, config: Mapping[str, Any], folder: Path, *, job_type: str = "run"
    ) -> Any:
        """A W&B run in `folder`; offline, with a warning, where an online one cannot be had."""
        import wandb

        def init(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,
                name=name,
                group=group,
                job_type=job_type,
                config=dict(config),
                dir=folder,
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=CONNECT_SECONDS, finish_timeout=FINISH_SECONDS
                ),
            )

        if self.mode == "online":
            try:
                return init("online")
            except (wandb.Error, OSError) as error:
                wandb.teardown()
                LOG.warning(
                    "W&B cannot be reached (%s); tracking offline, send it later with: wandb sync '%s'",
                    (str(error).splitlines() or [type(error).__name__])[0],
                    folder / "wandb",
                )
        return init("offline")


class _Both:
    def __init__(self, jsonl: Tracker, run: Any) -> None:
        self.jsonl = jsonl
        self.run = run
        self.lost = False

    def mirror(self, tell: Callable[[], object]) -> None:
        """Tell W&B; once it is gone, say so and go on without it: the JSONL files have everything."""
        import wandb

        if self.lost:
            return
        try:
            tell()
        except (wandb.Error, OSError) as error:
            self.lost = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            LOG.warning("W&B is gone (%s); the run goes on, its numbers are in metrics.jsonl", reason)

    def log(self, metrics: Mapping[str, float], *, step: Mapping[str, int]) -> None:
        self.jsonl.log(metrics, step=step)
        self.mirror(lambda: self.run.log({**step, **metrics}))

    def finish(self, summary: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        self.jsonl.finish(summary, blocks)
        if blocks:
            columns = list(blocks[0])
            rows = [[block.get(column) for column in columns] for block in blocks]
            self.mirror(lambda: self.run.log({"blocks": wandb.Table(columns=columns, data=rows)}))
        self.mirror(lambda: self.run.summary.update(dict(summary)))
