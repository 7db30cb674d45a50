"""reprune: reconstruction-aware pruning of language models. `reprune.results(DIR)` is a table of the runs below a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reprune.reporting.frame import results as results

__version__ = "0.1.0"

RESULTS_VERSION = 1
"""Part of every run's hash: raised when a fix changes numbers, so that old results are not taken for new ones."""


def __getattr__(name: str) -> Any:
    # pandas takes a second to import, which a command line that needs none of it should not wait for.
    if name == "results":
        from reprune.reporting.frame import results

        return results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
