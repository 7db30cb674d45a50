"""Pruning methods, a file each."""
