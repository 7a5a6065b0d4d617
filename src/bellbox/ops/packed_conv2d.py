"""A packed convolution in one operation: code each sample once, multiply what each window sees of it, scale.

The arguments are those of `packed_linear` with a filter a row, `[kernel height, kernel width, channels / groups]`,
and the geometry; see docs/format.md, "Convolutions". A sum and a ReLU may follow in the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bellbox.core.geometry import ConvGeometry, pixels_of
from bellbox.core.grid import Grid
from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Circumstances, Operation, bind, is_direct
from bellbox.ops.integer import float_matmul, scaled_product
from bellbox.ops.packed_linear import (
    SCHEMA,
    TENSORS,
    check,
    encode_input,
    input_gradient,
    is_differentiated,
    with_gradient,
    with_signs,
)
from bellbox.ops.weight_layout import unpack, unpack_operation


def geometry_numbers(geometry: ConvGeometry) -> list[int]:
    """As the operation takes it: kernel, stride, padding (left, right, top, bottom), dilation, groups."""
    return [*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups]


def _geometry(numbers: list[int]) -> ConvGeometry:
    if len(numbers) != 11 or min(numbers) < 0 or min(*numbers[:4], *numbers[8:]) < 1:
        raise BellboxError(f"packed convolution: geometry {numbers} is none")
    kh, kw, sh, sw, left, right, top, bottom, dh, dw, groups = numbers
    return ConvGeometry((kh, kw), (sh, sw), (left, right, top, bottom), (dh, dw), groups)


def integer_convolution(
    image: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    act_scale: Tensor,
    row_scale: Tensor,
    geometry: ConvGeometry,
) -> Tensor:
    """`float32(sum of products) * (weight_scale * act_scale) * row_scale`, the reference of packed convolutions.

    Args:
        image: int8 `[batch, height, width, channels]`, integer levels.
        weight: int8 `[out, kernel height * kernel width * channels / groups]`.
        weight_scale: fp32 `[out]`, what one integer of a row is worth.
        act_scale: fp32 `[]`.
        row_scale: fp32 `[batch, 1]`.
        geometry: the geometry.

    Returns:
        fp32 `[batch, out height, out width, out]`.
    """
    height, width = geometry.output_size(*image.shape[1:3])
    out = torch.empty(len(image), height, width, len(weight), device=image.device)
    by_group = weight.view(geometry.groups, -1, weight.shape[1])
    for part, patches in geometry.some_patches(image):
        row_scales = row_scale[part].repeat_interleave(height * width, 0)
        if geometry.groups == 1:
            product = scaled_product(patches[0], weight, weight_scale, act_scale, row_scales)
        else:
            sums = float_matmul(patches, by_group).transpose(0, 1).flatten(1)
            product = sums.to(torch.float32) * (weight_scale * act_scale) * row_scales
        out[part] = product.view(-1, height, width, len(weight))
    return out


def _reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor, act_thresholds: Tensor,
    act_rstd: Tensor | None, act_signs: Tensor | None, in_features: int, weight_levels: int,
    weight_zero_point: float, act_zero_point: float, block: int, normalise: str, rescale: bool, channels: int,
    geometry: list[int], add: Tensor | None, relu: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    shape = _geometry(list(geometry))
    if x.dim() != 4 or x.shape[1] != channels or channels % shape.groups:
        raise BellboxError(
            f"a packed convolution of {channels} channels got shape {tuple(x.shape)}, dtype {x.dtype}: "
            "[batch, channels, height, width] is needed"
        )
    depth, outputs = channels // shape.groups, weight_scale.numel()
    check(
        x, weight, weight_scale, bias, act_scale, act_thresholds, act_rstd, act_signs, in_features, weight_levels,
        weight_zero_point, act_zero_point, block, normalise, rescale, depth,
    )  # fmt: skip
    if in_features != shape.kernel[0] * shape.kernel[1] * depth or outputs % shape.groups:
        raise BellboxError(f"packed convolution: {in_features} weights a filter do not fit the geometry")
    rows = with_signs(pixels_of(x, depth, ""), act_signs).flatten(1)
    codes, row_scales = encode_input(
        rows, act_thresholds, act_rstd, act_zero_point, block, normalise, rescale
    )
    inputs, weights = Grid(act_thresholds.numel() + 1, act_zero_point), Grid(weight_levels, weight_zero_point)
    product = integer_convolution(
        inputs.decode_int8(codes).view(len(x), *x.shape[2:], channels),
        weights.decode_int8(unpack_operation.reference(weight, outputs, in_features, weight_levels)),
        weight_scale.reshape(-1) / weights.multiplier,
        act_scale.reshape(()).to(torch.float32) / inputs.multiplier,
        row_scales,
        shape,
    )
    if bias is not None:
        product = product + bias.to(torch.float32)
    out = product.permute(0, 3, 1, 2).to(dtype)
    out = out if add is None else out + add
    return out.relu() if relu else out


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    del weight
    geometry, add, dtype = _geometry(list(rest[-4])), rest[-3], rest[-1]
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    shape = x.shape[0], height, width, weight_scale.numel()
    out = x.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)
    return out if add is None else out + add  # may be broader and of a wider dtype


operation = Operation(
    f"packed_conv2d({SCHEMA}, int channels, int[] geometry, Tensor? add, bool relu, ScalarType dtype) -> Tensor",
    _reference,
    _fake,
)


class BoundConv:
    """A packed convolution's call with all but the input fixed; see `packed_linear.Bound`.

    Args:
        buffers: the layer's own dictionary of buffers.
        numbers: the arguments from `in_features` to `rescale`.
        channels: of the input.
        geometry: see `geometry_numbers`.
    """

    def __init__(
        self, buffers: dict[str, Tensor | None], numbers: tuple[Any, ...], channels: int, geometry: list[int]
    ) -> None:
        self._buffers, self._numbers, self._channels, self._geometry = buffers, numbers, channels, geometry
        self._plan: Callable[..., Tensor | None] | None = None
        self._circumstances = Circumstances()

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the schema after the input."""
        return (self._buffers["packed"], *(self._buffers[name] for name in TENSORS[1:]))

    def __call__(
        self, x: Tensor, dtype: torch.dtype, add: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """`[batch, channels, height, width]` to `[batch, out_channels, out height, out width]` in `dtype`."""
        if x.dim() == 4 and x.shape[1] == self._channels and is_direct(x) and (add is None or is_direct(add)):
            for _ in range(2):  # once more where one of the buffers lies elsewhere now
                if self._plan is not None and self._circumstances.hold():
                    out = self._plan(x, dtype, add, relu)
                    if out is not None:
                        return out
                fixed = {"numbers": self._numbers, "channels": self._channels, "geometry": self._geometry}
                self._plan, self._circumstances = bind("packed_conv2d", self._buffers, fixed), Circumstances()
                if self._plan is None:
                    break
        if is_differentiated(x):  # what follows the convolution has a gradient of its own
            out = with_gradient(lambda given: self._run(given, dtype, None, False), self._gradient, x)
            out = out if add is None else out + add
            return out.relu() if relu else out
        return self._run(x, dtype, add, relu)

    def _run(self, x: Tensor, dtype: torch.dtype, add: Tensor | None, relu: bool) -> Tensor:
        rest = self._channels, self._geometry, add, relu, dtype
        return operation(x, *self.tensors(), *self._numbers, *rest)

    def _gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        weight, weight_scale, _, act_scale, thresholds, rstd, signs = self.tensors()
        columns, n, zero_point, act_zero_point, block, normalise, rescale = self._numbers
        assert weight is not None
        assert weight_scale is not None
        assert act_scale is not None
        assert thresholds is not None
        shape, depth = _geometry(list(self._geometry)), self._channels // self._geometry[-1]
        levels = Grid(n, zero_point).decode(unpack(weight, weight_scale.numel(), columns, n))
        filters = (
            (levels * weight_scale.reshape(-1, 1)).view(len(levels), *shape.kernel, depth).permute(0, 3, 1, 2)
        )
        rows = with_signs(pixels_of(x.detach().to(torch.float32), depth, ""), signs)

        def into_levels(follows: Tensor) -> Tensor:
            with torch.enable_grad():
                image = torch.zeros(x.shape, requires_grad=True, device=x.device)
                out = shape.convolve(image, filters, None)
                scaled = grad.to(torch.float32) * follows.reshape(-1, 1, 1, 1)
                (found,) = torch.autograd.grad(out, image, scaled)
            return pixels_of(found, depth, "").flatten(1)

        with torch.no_grad():
            numbers = act_zero_point, block, normalise, rescale
            found = input_gradient(
                rows.flatten(1), into_levels, act_scale, thresholds, rstd, None, *numbers
            ).view(len(x), -1, depth)
            found = with_signs(found, signs).view(len(x), *x.shape[2:], self._channels).permute(0, 3, 1, 2)
        return found.to(x.dtype)
