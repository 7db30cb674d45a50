"""The block loop: dense and pruned chains, statistics, windows, resumable state."""
