"""Metrics to JSONL and Weights & Biases, progress to a person."""
