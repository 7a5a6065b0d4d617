"""The convolution for training, as in BBQ-Vision (arXiv 2603.01599).

Input and weight are rotated over the channels at each pixel, block by block within a group, so that the rotations
cancel in every product of a pixel with a column of the filter. A granularity of each row is then one of each sample
`(C, H, W)` for the input, and one of each output channel for the weight. Depthwise convolutions have one channel a
group: nothing to rotate. Padding is the value 0 after quantization, as in the paper's code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.core.geometry import ConvGeometry, pixels_of
from bellbox.nn.quantized_linear import ActivationQuantizer, QuantizedLayer, epilogue, integer_scale, rotated
from bellbox.ops.packed_conv2d import integer_convolution
from bellbox.quantizers.base import Quantizer, rotate_vectors


class QuantizedConv2d(QuantizedLayer):
    """`nn.Conv2d` whose weight and input are fake-quantized; see `QuantizedLayer` for the arguments.

    The weight quantizer sees rows `[out_channels, kernel height * kernel width * in_channels / groups]`, channels
    innermost; the activation quantizer has `in_channels / groups` features and `samples` set.

    Raises:
        BellboxError: a padding mode other than zeros, or two rotations that do not cancel.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        weight_quantizer: Quantizer | None,
        activation_quantizer: ActivationQuantizer | None,
        owned: bool = True,
        weights_rotated: bool = False,
    ) -> None:
        super().__init__(layer, weight_quantizer, activation_quantizer, owned, weights_rotated)
        self.geometry, self.padding = ConvGeometry.of(layer), layer.padding
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels

    @property
    def depth(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.geometry.groups

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        geometry = self.geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={geometry.kernel}, stride={geometry.stride}, "
            f"padding={self.padding}, dilation={geometry.dilation}, groups={geometry.groups}, "
            f"bias={self.bias is not None}"
        )

    def rows_of(self, weight: Tensor) -> Tensor:
        """`[out_channels, kernel height * kernel width * in_channels / groups]`; see the class."""
        return weight.permute(0, 2, 3, 1).flatten(1)

    def _as_weight(self, rows: Tensor) -> Tensor:
        """The inverse of `rows_of`."""
        return rows.view(len(rows), *self.geometry.kernel, self.depth).permute(0, 3, 1, 2)

    def rotated_weight(self, back: bool = False) -> Tensor:
        """See `QuantizedLayer.rotated_weight`."""
        quantizer = self.rotating_quantizer
        if quantizer is None:
            return self.weight
        vectors = self.weight.detach().permute(0, 2, 3, 1).flatten(1).clone()  # never a view of the weight
        vectors = vectors.view(len(vectors), -1, quantizer.features)
        return self._as_weight(rotated(vectors, quantizer, back).flatten(1))

    def unquantized(self) -> nn.Conv2d:
        """See `QuantizedLayer.unquantized`."""
        geometry = self.geometry
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, geometry.kernel, geometry.stride, self.padding,  # type: ignore[arg-type]
            geometry.dilation, geometry.groups, self.bias is not None, device="meta",
        )  # fmt: skip
        conv.weight, conv.bias = self.weight, self.bias  # type: ignore[assignment]
        return conv.train(self.training)

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

    def _integer(self, x: Tensor) -> Tensor:
        assert self.activation_quantizer is not None
        weight, weight_scale = self._integer_weight()
        levels, row_scale = self.activation_quantizer.integers(self.vectors_of(x), self)
        act_scale = integer_scale(self.activation_quantizer.quantizer).reshape(())
        image = levels.view(len(x), *x.shape[2:], self.in_channels)
        product = integer_convolution(image, weight, weight_scale, act_scale, row_scale, self.geometry)
        return epilogue(product, self.bias, x).permute(0, 3, 1, 2)
