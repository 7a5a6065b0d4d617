"""A tensor that was coded for a product on integers, differentiable as its fake-quantized value is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coded(NamedTuple):
    """Rows of an input or of a weight, as bytes, and what gradients flow to."""

    value: Tensor
    """`[rows, features]`: gradients to the fake-quantized rows go here. Its numbers may be anything (`stand_in`)."""
    kept: Tensor
    """int8 `[rows, features]`, see `bellbox.ops.kept`."""
    thresholds: tuple[float, ...]
    """n-1, of `kept`."""
    scale: Tensor
    """fp32, what a level is worth: `[]`, `[1]` or `[rows, 1]`."""
    row_scale: Tensor
    """fp32 `[rows, 1]` or `[1, 1]`: what a row is multiplied with beside, NaN where it is not finite."""


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one number in memory, for gradients of its shape to go to."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)
