"""The contract that every quantization method keeps, and nothing about layers or models.

A quantizer turns a float tensor into codes and back. Two views of it must be the same function:

- `forward(x)`: fake quantization. Returns the dequantized tensor, differentiable, for training.
- `encode(x)` with `scale()`: the stored integers and what one level is worth, for evaluation and packing.

Both live in the rotated domain (`block`): weights and activations are rotated alike and never rotated back.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

from bellbox.levels import Levels

Statistic = Literal["row", "tensor", "ema", "token"]
"""How sigma is taken. Weights: `row`. Activations: `token` (RMS of each row), `ema` (running scale), `tensor`."""

_debug = os.environ.get("BELLBOX_DEBUG", "") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Raise `BellboxError` on NaN or infinity in a quantizer's input instead of passing it on as NaN.

    Costs one look at a small tensor a call. Also switched on by the environment variable BELLBOX_DEBUG=1.
    """
    global _debug
    _debug = enabled


def debug_enabled() -> bool:
    """Whether non-finite inputs raise."""
    return _debug


class Quantizer(nn.Module, ABC):
    """One tensor's quantizer: a weight matrix, or the input of one or several sibling layers."""

    levels: Levels
    block: int
    """Rotation block along the last dimension; 1 for none."""
    statistic: Statistic
    name: str = ""
    """Dotted name of the layer it belongs to, for messages."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize: `[..., features]` to the same shape, rotated domain, autocast dtype where active."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and which rows may be trusted.

        Args:
            x: `[..., features]`.

        Returns:
            uint8 codes `[..., features]`, and fp32 `[..., 1]`: 1.0, or NaN for a row with a non-finite entry.
        """

    @abstractmethod
    def scale(self) -> Tensor:
        """What one level is worth, fp32: `[rows, 1]` for weights, `[]` for activations."""

    @abstractmethod
    def why_not_packed(self) -> str | None:
        """None where it can be packed into integers and run causally, else the reason and the way out."""

    def codes(self, x: Tensor) -> Tensor:
        """Only the codes of `encode`."""
        return self.encode(x)[0]
