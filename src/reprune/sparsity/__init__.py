"""Patterns, allocations over layers, schedules over steps."""
