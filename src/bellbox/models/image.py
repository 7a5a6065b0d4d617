"""Common parts of vision models: the way from an image of numbers in [0, 1] to normalised ones, skipped blocks, and the
ends of a network in evaluation, whose sums run in one order wherever they are taken (`ops/float_linear.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bellbox.ops import native
from bellbox.ops.activate import is_pinned
from bellbox.ops.dispatch import is_direct
from bellbox.ops.float_linear import LANES, float_linear


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """What a convolution makes of `x`; in full precision and in evaluation, row by row of the window."""
    if type(layer) is not nn.Conv2d or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    if (
        isinstance(layer.padding, str) or layer.groups > 1 or max(layer.dilation) > 1
    ):  # none of our models has such
        return layer(x)
    return _convolved(x, layer.weight, layer.bias, layer.stride, layer.padding)


def classify(layer: nn.Module, x: Tensor) -> Tensor:
    """What a classifier makes of `[batch, features]`; in full precision and in evaluation, label by label."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    return _classified(x, layer.weight, layer.bias)


def mean_of(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean over some dimensions; in evaluation in fp64, rounded once."""
    return _mean(x, list(dims))


def _is_whole(x: Tensor, weight: Tensor) -> bool:
    return is_pinned(x) and is_direct(x) and native.available() and weight.dtype == torch.float32


# One node each to `torch.fx`: whether they are pinned is asked when they run.
@fx.wrap
def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    if not _is_whole(x, weight):
        return F.conv2d(x, weight, bias, stride, padding)
    rows, columns = (
        (size + 2 * pad - kernel) // step + 1
        for size, pad, kernel, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    )
    windows = F.unfold(x, weight.shape[2:], padding=padding, stride=stride).transpose(1, 2)
    filters, width = weight.detach().flatten(1), windows.shape[2]
    # Zeros behind each row change no sum, and the kernel is slow at the rest of a row that fills no lanes.
    whole = -(-width // LANES) * LANES
    patches = x.new_zeros(*windows.shape[:2], whole)
    patches[..., :width] = windows
    out = float_linear(patches, F.pad(filters, (0, whole - width)))
    out = out if bias is None else out + bias
    return out.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


@fx.wrap
def _classified(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _is_whole(x, weight):
        return F.linear(x, weight, bias)
    out = float_linear(x.contiguous(), weight.contiguous())
    return out if bias is None else out + bias


@fx.wrap
def _mean(x: Tensor, dims: list[int]) -> Tensor:
    return x.double().mean(dims).to(torch.float32) if is_pinned(x) else x.mean(dims)


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
