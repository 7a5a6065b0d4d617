"""Optimizers: parameter groups, and constrained weights around them."""
