"""Reconstruction: the space of techniques, losses, trainable parameters, the optimiser loop."""
