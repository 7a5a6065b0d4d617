"""Convolutions for training, as in BBQ-Vision (arXiv 2603.01599).

Input and weight are rotated over the channels at each pixel, block by block within a group, so that the rotations
cancel in every product of a pixel with a column of the filter. Sigma of each row is then one of each sample
`(C, H, W)` for the input, and one of each output channel for the weight. Depthwise convolutions have one channel a
group: nothing to rotate. Padding is the value 0 after quantization, as in the paper's code. A convolution over a line
is one over an image of height 1: its sample, with one sigma, is the whole line.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bellbox.core.geometry import ConvGeometry, lines_as_images, pixels_of
from bellbox.errors import BellboxError
from bellbox.nn.quantized import ActivationQuantizer, QuantizedLayer, turned_vectors
from bellbox.ops.encode import result_dtype
from bellbox.ops.packed_conv2d import BoundConv, geometry_numbers
from bellbox.quantizers.base import Quantizer, rotate_vectors


class QuantizedConv(QuantizedLayer):
    """A convolution whose weight and input are fake-quantized; see `QuantizedLayer` for the arguments.

    The weight quantizer sees rows `[out_channels, kernel height * kernel width * in_channels / groups]`, channels
    innermost; the activation quantizer has `in_channels / groups` features and `samples` set.

    Raises:
        BellboxError: a padding mode other than zeros, or two rotations that do not cancel.
    """

    in_channels: int
    out_channels: int

    def __init__(
        self,
        layer: nn.Conv1d | nn.Conv2d,
        weight_quantizer: Quantizer | None,
        activation_quantizer: ActivationQuantizer | None,
        owned: bool = True,
        weights_rotated: bool = False,
    ) -> None:
        super().__init__(layer, weight_quantizer, activation_quantizer, owned, weights_rotated)
        self.geometry = ConvGeometry.of(layer)

    @property
    def depth(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.geometry.groups

    @property
    def places(self) -> int:
        """See `QuantizedLayer.places`."""
        return self.geometry.kernel[0] * self.geometry.kernel[1]

    def unquantized(self) -> nn.Module:
        """See `QuantizedLayer.unquantized`."""
        plain = super().unquantized()
        plain.__dict__.pop("geometry", None)
        return plain

    def rows_of(self, weight: Tensor) -> Tensor:
        """`[out_channels, kernel height * kernel width * in_channels / groups]`; see the class."""
        return weight.permute(0, 2, 3, 1).flatten(1)

    def _as_weight(self, rows: Tensor) -> Tensor:
        """The inverse of `rows_of`."""
        return rows.view(len(rows), *self.geometry.kernel, self.depth).permute(0, 3, 1, 2)

    def turned(self, weight: Tensor, back: bool = False) -> Tensor:
        """See `QuantizedLayer.turned`."""
        quantizer = self.rotating_quantizer
        if quantizer is None:
            return weight
        vectors = weight.permute(0, 2, 3, 1).flatten(1).clone()  # never a view of the weight
        vectors = vectors.view(len(vectors), -1, quantizer.features)
        return self._as_weight(turned_vectors(vectors, quantizer, back).flatten(1))

    def vectors_of(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` as `[batch, height * width * groups, channels / groups]`.

        Raises:
            BellboxError: an input of another shape.
        """
        name = self._name
        if x.dim() == 4 and x.shape[1] != self.in_channels:
            raise BellboxError(
                f"input of {name or 'a convolution'} has {x.shape[1]} channels, {self.in_channels} are needed"
            )
        return pixels_of(x, self.depth, name)

    @property
    def _name(self) -> str:
        return self.weight_quantizer.name.removesuffix(".weight") if self.weight_quantizer else ""

    def _dequantized(self, x: Tensor) -> Tensor:
        weight, activation = self._as_weight(self._quantized_rows()), self.activation_quantizer
        shape = len(x), *x.shape[2:], self.in_channels
        if activation is not None:
            x = activation(self.vectors_of(x), self).view(shape).permute(0, 3, 1, 2)
        elif self.weight_quantizer is not None:
            vectors, signs = self.vectors_of(x), self.weight_quantizer.signs
            vectors = vectors if signs is None else vectors * signs[: self.depth]
            x = rotate_vectors(vectors, self.weight_quantizer.block).view(shape).permute(0, 3, 1, 2)
        return self.geometry.convolve(x, weight, self.bias)

    def _bind(self, buffers: dict[str, Tensor | None]) -> Callable[..., Tensor]:
        return BoundConv(buffers, self.packed_numbers(), self.in_channels, geometry_numbers(self.geometry))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[batch, in_channels, height, width]`, or one sample without the batch, to likewise the outputs."""
        return super().forward(x.unsqueeze(0)).squeeze(0) if x.dim() == 3 else super().forward(x)

    def _integer(self, x: Tensor) -> Tensor:
        assert self.activation_quantizer is not None
        self.vectors_of(x)  # refuses other shapes
        self.activation_quantizer.observe(self.vectors_of(x), self)
        with torch.no_grad():
            return self.packed_call(x)(x, result_dtype(x))


class QuantizedConv2d(QuantizedConv, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """`nn.Conv2d` whose weight and input are fake-quantized; see `QuantizedConv`."""

    plain_kind = nn.Conv2d


class QuantizedConv1d(QuantizedConv, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """`nn.Conv1d` whose weight and input are fake-quantized, as those of an image of height 1; see `QuantizedConv`."""

    plain_kind = nn.Conv1d

    def rows_of(self, weight: Tensor) -> Tensor:
        """`[out_channels, kernel * in_channels / groups]`, channels innermost."""
        return super().rows_of(weight.unsqueeze(2))

    def turned(self, weight: Tensor, back: bool = False) -> Tensor:
        """See `QuantizedLayer.turned`."""
        return super().turned(weight.unsqueeze(2), back).squeeze(2)

    def vectors_of(self, x: Tensor) -> Tensor:
        """`[batch, channels, length]`, or that as an image, as `[batch, length * groups, channels / groups]`.

        Raises:
            BellboxError: an input of another shape.
        """
        return super().vectors_of(x if x.dim() == 4 else lines_as_images(x, self._name))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[batch, in_channels, length]` to `[batch, out_channels, out length]`, or one sample without the batch."""
        if x.dim() == 2:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return super().forward(lines_as_images(x, self._name)).squeeze(2)
