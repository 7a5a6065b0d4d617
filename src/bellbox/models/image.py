"""Common parts of vision models: the way from an image of numbers in [0, 1] to normalised ones, and skipped blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """`(x - mean) / std` of each channel.

    Part of the model, so that a saved model takes images as they are: the numbers are buffers, set from the training
    images before the first step.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((channels, 1, 1), 0.25))

    def set(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set both, one number a channel."""
        self.mean.copy_(torch.tensor(mean).view(-1, 1, 1))
        self.std.copy_(torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to the same."""
        return (x - self.mean) / self.std


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, whole samples are zeroed, the others scaled up."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, ...]` to the same."""
        if not self.training or self.probability == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.probability
        return x * kept.to(x.dtype) / (1 - self.probability)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.probability:.3g}"


def rising(last: float, count: int) -> list[float]:
    """Probabilities of `count` blocks, evenly from 0 to `last`."""
    return [last * i / max(1, count - 1) for i in range(count)]
