"""The product of a training forward on integers: the packed layer's, with a straight-through gradient.

Both sides are coded anyway. So the forward multiplies the codes on the packed kernels, and is the deployed function
to the last bit. For the backward a byte a number is kept of each side (`bellbox.ops.kept`), in place of two numbers in
the compute dtype. They are decoded when they are multiplied with the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bellbox.core.grid import Grid
from bellbox.ops import native
from bellbox.ops.dispatch import multiplies_integers
from bellbox.ops.kept import kept_codes, kept_linear, kept_product
from bellbox.ops.transforms import constant_when_traced, refuse_second_derivative
from bellbox.ops.weight_layout import prepack
from bellbox.quantizers.base import Quantizer
from bellbox.quantizers.coded import Coded
from bellbox.quantizers.learned import transforming

MOST_LEVELS = 128
"""That a byte keeps."""


class CodedWeight(NamedTuple):
    """A weight laid out for the kernels, once for all forwards of an optimizer step."""

    coded: Coded
    packed: Tensor
    """uint8, see `bellbox.ops.weight_layout`."""
    scale: Tensor
    """fp32 `[rows]`, what a level of a row is worth."""

    def with_value(self, value: Tensor) -> CodedWeight:
        """The same, whose gradient goes to another tensor."""
        return self._replace(coded=self.coded._replace(value=value))

    @classmethod
    def of(cls, rows: Tensor, quantizer: Quantizer) -> CodedWeight:
        """`[rows, features]`, coded by its quantizer."""
        coded = quantizer.coded(rows)
        with torch.no_grad():
            packed = prepack(kept_codes(coded.kept, coded.thresholds), quantizer.levels.n)
            scale = (coded.scale.detach() * coded.row_scale).reshape(-1).expand(len(rows)).contiguous()
        return cls(coded, packed, scale)


def serves(
    weight: Quantizer, activation: Quantizer, chosen: bool | None, device: str, dtype: torch.dtype
) -> bool:
    """Whether a product in training runs on integers.

    Args:
        weight: quantizer of the weight; both lie on grids of int8.
        activation: of the input.
        chosen: what the recipe says: None for where it is faster (docs/training.md), which is in bf16 on the compiled
            kernels, where both quantizers keep bytes.
        device: kind of device.
        dtype: of the result.
    """
    pair = weight, activation
    able = dtype != torch.float64 and not transforming()
    if chosen is False or not able or not all(map(has_bytes, pair)):
        return False
    if chosen:
        return True
    return all(map(keeps_few, pair)) and dtype == torch.bfloat16 and on_kernels(device)


@constant_when_traced
def on_kernels(device: str) -> bool:
    """Whether products on integers run on kernels, on a kind of device."""
    return multiplies_integers(device)


def has_bytes(quantizer: Quantizer) -> bool:
    """Whether a product on integers can take its codes."""
    return quantizer.normalise != "norm" and quantizer.levels.n <= MOST_LEVELS


def keeps_few(quantizer: Quantizer) -> bool:
    """Whether that is faster, since the kernels take its codes and bytes are all that is kept."""
    return quantizer.keeps_bytes and quantizer.levels.n <= native.MAX_LEVELS


def coding_of(weight: Quantizer) -> tuple[bool, bool]:
    """What decides about a layer besides its input and the recipe; alike in layers that share an input."""
    return has_bytes(weight), keeps_few(weight)


def integer_product(
    x: Coded, inputs: Grid, weight: CodedWeight, weights: Grid, bias: Tensor | None
) -> Tensor:
    """`[rows, features]` times a weight, plus bias: `[rows, outputs]` in the dtype of `x.value`.

    Args:
        x: the coded input.
        inputs: grid of its codes.
        weight: the coded weight.
        weights: grid of its codes.
        bias: `[outputs]` or None.
    """
    scale = x.scale.detach().reshape(1).to(torch.float32)
    return _Product.apply(  # type: ignore[return-value]
        x.value, weight.coded.value, bias, x.kept, x.row_scale, scale, weight.coded.kept, weight.packed, weight.scale,
        x.thresholds, inputs.zero_point, weight.coded.thresholds, weights.zero_point,
    )  # fmt: skip


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        value: Tensor, weight_value: Tensor, bias: Tensor | None, kept: Tensor, row_scale: Tensor, scale: Tensor,  # noqa: ARG004
        weight_kept: Tensor, packed: Tensor, weight_scale: Tensor, thresholds: tuple[float, ...],  # noqa: ARG004
        zero_point: float, weight_thresholds: tuple[float, ...], weight_zero_point: float,
    ) -> Tensor:  # fmt: skip
        wide = None if bias is None else bias.to(torch.float32)
        numbers = len(weight_thresholds) + 1, weight_zero_point, zero_point
        return kept_linear(
            kept, row_scale, packed, weight_scale, wide, scale, thresholds, *numbers, value.dtype
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        value, weight_value, bias, kept, row_scale, scale, weight_kept, _, weight_scale, *numbers = inputs
        ctx.save_for_backward(kept, row_scale * scale, weight_kept, weight_scale)
        ctx.numbers = numbers
        ctx.dtypes = value.dtype, weight_value.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        kept, worth, weight_kept, weight_scale = ctx.saved_tensors
        thresholds, zero_point, weight_thresholds, weight_zero_point = ctx.numbers
        dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = grads[0]
        g_x = g_weight = g_bias = None
        if ctx.needs_input_grad[0]:
            offset = Grid(len(weight_thresholds) + 1, weight_zero_point).offset
            g_x = kept_product(grad, weight_kept, weight_scale, weight_thresholds, offset, False).to(dtype)
        if ctx.needs_input_grad[1]:
            offset = Grid(len(thresholds) + 1, zero_point).offset
            g_weight = kept_product(grad, kept, worth, thresholds, offset, True).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            g_bias = grad.sum(0).to(bias_dtype)
        return g_x, g_weight, g_bias, *[None] * 10
