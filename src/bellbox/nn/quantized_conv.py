"""The convolution for training, as in BBQ-Vision (arXiv 2603.01599).

Input and weight are rotated over the channels at each pixel, block by block within a group, so that the rotations
cancel in every product of a pixel with a column of the filter. Sigma of each row is then one of each sample
`(C, H, W)` for the input, and one of each output channel for the weight. Depthwise convolutions have one channel a
group: nothing to rotate. Padding is the value 0 after quantization, as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bellbox.core.geometry import ConvGeometry, pixels_of
from bellbox.errors import BellboxError
from bellbox.nn.quantized import ActivationQuantizer, QuantizedLayer, turned_vectors
from bellbox.ops.encode import result_dtype
from bellbox.ops.packed_conv2d import BoundConv, geometry_numbers
from bellbox.quantizers.base import Quantizer, rotate_vectors


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """`nn.Conv2d` whose weight and input are fake-quantized; see `QuantizedLayer` for the arguments.

    The weight quantizer sees rows `[out_channels, kernel height * kernel width * in_channels / groups]`, channels
    innermost; the activation quantizer has `in_channels / groups` features and `samples` set.

    Raises:
        BellboxError: a padding mode other than zeros, or two rotations that do not cancel.
    """

    plain_kind = nn.Conv2d

    def __init__(
        self,
        layer: nn.Conv2d,
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
        name = self.weight_quantizer.name.removesuffix(".weight") if self.weight_quantizer else ""
        if x.dim() == 4 and x.shape[1] != self.in_channels:
            raise BellboxError(
                f"input of {name or 'a convolution'} has {x.shape[1]} channels, {self.in_channels} are needed"
            )
        return pixels_of(x, self.depth, name)

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

    def _integer(self, x: Tensor) -> Tensor:
        assert self.activation_quantizer is not None
        self.vectors_of(x)  # refuses other shapes
        self.activation_quantizer.observe(self.vectors_of(x), self)
        with torch.no_grad():
            return self.packed_call(x)(x, result_dtype(x))
