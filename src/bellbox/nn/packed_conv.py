"""Convolutions for inference: codes only, each input element coded once, windows of integers multiplied."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from bellbox.core.geometry import ConvGeometry, lines_as_images, pixels_of
from bellbox.core.grid import Grid
from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError
from bellbox.nn.packed import InputCoding, PackedLayer
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.quantized_conv import QuantizedConv
from bellbox.ops.dispatch import Choice
from bellbox.ops.encode import result_dtype
from bellbox.ops.packed_conv2d import BoundConv, geometry_numbers, operation
from bellbox.ops.packed_linear import with_signs


class PackedConv(PackedLayer):
    """A packed layer whose rows of weights are filters `[kernel height, kernel width, in_channels / groups]`.

    A sample `[height, width, in_channels]` is coded as one row. Padding is the integer 0.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        geometry: of the window.
        weight_levels: the integers that weight codes stand for.
        coding: how the input is coded.
        bias: whether there is a bias.

    Its buffers are those of `PackedLayer`; `act_signs` is int8 `[in_channels / groups]`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        geometry: ConvGeometry,
        weight_levels: Grid,
        coding: InputCoding,
        bias: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.in_channels, self.out_channels, self.geometry = in_channels, out_channels, geometry
        self._as_convolution(geometry)
        places = geometry.kernel[0] * geometry.kernel[1]
        columns = places * (in_channels // geometry.groups)
        self._set_up(out_channels, columns, places, weight_levels, coding, bias)
        self.folded = False
        """Whether a batch norm went into scale and bias (`fold_batch_norms`)."""

    def _as_convolution(self, geometry: ConvGeometry) -> None:
        left, right, top, bottom = geometry.padding
        # What code that looks at a convolution asks for, under torch's names.
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation
        self.padding, self.groups, self.padding_mode = (top, left), geometry.groups, "zeros"
        self._reversed_padding_repeated_twice = [left, right, top, bottom]
        self.transposed, self.output_padding = False, (0, 0)

    @classmethod
    def like(cls, layer: QuantizedLayer, weight_levels: Grid, coding: InputCoding) -> Self:
        """See `PackedLayer.like`."""
        assert isinstance(layer, QuantizedConv)
        sizes = layer.in_channels, layer.out_channels, layer.geometry
        return cls(*sizes, weight_levels, coding, layer.bias is not None)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        geometry = self.geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={geometry.kernel}, stride={geometry.stride}, "
            f"padding={geometry.padding}, dilation={geometry.dilation}, groups={geometry.groups}, "
            f"bias={self.bias is not None}, weight_levels={self.weight_levels.n}, "
            f"activation_levels={self.coding.levels.n}"
        )

    def _bind(self) -> BoundConv:
        return BoundConv(self._buffers, self.numbers, self.in_channels, geometry_numbers(self.geometry))

    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes `[batch, height * width * in_channels]` of an input."""
        self._check(x)
        return self._input_codes_of(
            with_signs(pixels_of(x.detach(), self.features, ""), self.act_signs).flatten(1)
        )

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point() or x.dim() != 4 or x.shape[1] != self.in_channels:
            raise BellboxError(
                f"a packed convolution of {self.in_channels} channels got shape {tuple(x.shape)}, dtype {x.dtype}: "
                "[batch, channels, height, width] is needed"
            )

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.features, *self.geometry.kernel

    def _as_weight(self, rows: Tensor) -> Tensor:
        vectors = hadamard(rows.view(len(rows), self.places, self.features), self.coding.block)
        vectors = vectors if self.act_signs is None else vectors * self.act_signs
        return vectors.view(len(rows), *self.geometry.kernel, self.features).permute(0, 3, 1, 2)

    def explain(self) -> Choice:
        """See `PackedLayer.explain`."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.geometry.dilation, self.geometry.kernel, strict=True)]
        x = torch.zeros(1, self.in_channels, *reach, device=self.packed.device)
        fixed = self.in_channels, geometry_numbers(self.geometry), None, False, torch.float32
        return operation.choose((x, *self.bound.tensors(), *self.numbers, *fixed))[1]


class PackedConv2d(PackedConv, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """See `PackedConv`."""

    plain_kind = nn.Conv2d

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, add: Tensor | float | None = None, relu: bool = False
    ) -> Tensor:
        """`[batch, in_channels, height, width]` to `[batch, out_channels, out height, out width]`.

        Args:
            x: the input; one sample may come without the batch, and goes so.
            add: added to the result, in the same call where it has its shape and both are fp32.
            relu: whether a ReLU comes last, likewise.
        """
        if x.dim() == 3:
            beside = add.unsqueeze(0) if isinstance(add, Tensor) and add.dim() == 3 else add
            return self.forward(x.unsqueeze(0), beside, relu).squeeze(0)
        self._check(x)
        dtype = result_dtype(x)
        if add is None or (isinstance(add, Tensor) and not (add.requires_grad and torch.is_grad_enabled())):
            return self.bound(x, dtype, add, relu)
        out = self.bound(x, dtype) + add
        return out.relu() if relu else out


class PackedConv1d(PackedConv, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """A convolution over lines, which are images of height 1; see `PackedConv`."""

    plain_kind = nn.Conv1d

    def _as_convolution(self, geometry: ConvGeometry) -> None:
        super()._as_convolution(geometry)
        for name in ("kernel_size", "stride", "dilation", "padding", "output_padding"):
            setattr(self, name, getattr(self, name)[-1:])
        self._reversed_padding_repeated_twice = list(geometry.padding[:2])

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[batch, in_channels, length]` to `[batch, out_channels, out length]`, or one sample without the batch."""
        if x.dim() == 2:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        image = lines_as_images(x, "")
        self._check(image)
        return self.bound(image, result_dtype(x)).squeeze(2)

    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes `[batch, length * in_channels]` of an input."""
        return super().input_codes(lines_as_images(x, ""))

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.features, self.geometry.kernel[1]

    def _as_weight(self, rows: Tensor) -> Tensor:
        return super()._as_weight(rows).squeeze(2)
