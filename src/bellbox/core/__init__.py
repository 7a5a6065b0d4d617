"""Grids, rotations, packing and entropy: values, and pure functions on tensors."""
