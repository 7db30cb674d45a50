"""Calibration text: sources, the split by document, windows of tokens."""
