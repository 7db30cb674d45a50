"""reprune: reconstruction-aware pruning of language models."""

__version__ = "0.1.0"

RESULTS_VERSION = 1
"""Part of every run's hash: raised when a fix changes numbers, so that old results are not taken for new ones."""
