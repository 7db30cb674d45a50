"""Transforms: what makes another model of the dense one and is no mask, a file each."""
