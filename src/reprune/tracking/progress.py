"""What a person sees while a run goes on: bars on a terminal, plain lines with times elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from reprune.engine.windows import BlockWindow

LOG = logging.getLogger("reprune")
CONSOLE = Console(soft_wrap=True)


def configure_logging() -> None:
    """Our own lines on standard output, and nothing of the libraries below warnings."""
    if LOG.handlers:
        return
    if CONSOLE.is_terminal:
        handler: logging.Handler = RichHandler(
            console=CONSOLE, show_level=False, show_path=False, markup=False, log_time_format="%H:%M:%S"
        )
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def quiet_libraries() -> None:
    """No bars and banners of transformers, datasets or the hub."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class ProgressView:
    """Bars for blocks, steps and evaluation on a terminal; a line for every frozen block everywhere."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=CONSOLE,
            transient=True,
            disable=not CONSOLE.is_terminal,
        )
        self._blocks: Any = None
        self._steps: Any = None
        self._num_blocks = 0

    def __enter__(self) -> ProgressView:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def window(self, window: BlockWindow, num_blocks: int, steps: int) -> None:
        """See engine.loop.Listener."""
        self._num_blocks = num_blocks
        if self._blocks is None:
            self._blocks = self.bars.add_task("blocks", total=num_blocks, completed=window.first)
        if steps and self._steps is None:
            self._steps = self.bars.add_task("steps", total=steps)
        if steps:
            self.bars.reset(
                self._steps, description=f"blocks {window.first}-{window.stop - 1} steps", total=steps
            )

    def step(self) -> None:
        """See engine.loop.Listener."""
        self.bars.advance(self._steps)

    def frozen(self, row: Mapping[str, Any]) -> None:
        """See engine.loop.Listener."""
        self.bars.update(self._blocks, completed=row["block"] + 1)
        parts = [f"block {row['block'] + 1:>3}/{self._num_blocks}"]
        for role in ("calibration", "probe"):
            texts = row["after"].get(role, {})
            if texts:
                before = _mean(row["before"][role])
                parts.append(f"{role} error {before:9.4g} → {_mean(texts):9.4g}")
        LOG.info("   ".join(parts))

    def evaluation(self, name: str) -> Callable[[int, int], None]:
        """A bar for one evaluation."""
        task = self.bars.add_task(name, total=None)

        def update(done: int, total: int) -> None:
            self.bars.update(task, completed=done, total=total, visible=done < total)

        return update

    def clear(self) -> None:
        """Take the bars of the block loop away."""
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        self._blocks = self._steps = None


def _mean(texts: Mapping[str, Mapping[str, float]]) -> float:
    return sum(errors["error"] for errors in texts.values()) / len(texts)
