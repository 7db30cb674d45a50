"""Evaluators: what a pruned model still can do."""
