"""The rotation alone: for what is not coded right after it.

A weight-only layer rotates its input and multiplies floats; a backward pass rotates gradients back. The transform is
symmetric, so its gradient is itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bellbox.core.hadamard import butterfly_between
from bellbox.ops.dispatch import Operation
from bellbox.ops.encode import Scratch, chunks, compute_dtype
from bellbox.ops.preconditions import check_rows
from bellbox.ops.transforms import TransformableFunction, apply


def reference_rotate(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """`butterfly(x) * factor`, additions and product in fp32 (fp64 for fp64 input), rounded to `dtype` once.

    Args:
        x: `[..., features]`, any floating dtype.
        factor: `block**-0.5` gives the orthonormal transform.
        block: a power of two that divides `features`.
        dtype: of the result.

    Returns:
        A new tensor with the shape of `x`.
    """
    check_rows(x, block)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    wide, flat, target = compute_dtype(x), x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    scratch = Scratch(flat, 2, wide)
    for rows in chunks(flat):
        values = flat[rows].to(wide).contiguous()
        a, b = scratch.rows(rows)
        rotated = butterfly_between(values, block, (a, b)) if block > 1 else values
        target[rows] = torch.mul(rotated, factor)
    return out


def _fake(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    del factor, block
    return torch.empty(x.shape, dtype=dtype, device=x.device)


rotate = Operation(
    "rotate(Tensor x, float factor, int block, ScalarType dtype) -> Tensor", reference_rotate, _fake
)
"""See `reference_rotate`."""


def _batched(_info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return rotate(x.movedim(in_dims[0] or 0, 0).contiguous(), *rest), 0


rotate.register_vmap(_batched)


class _Rotation(TransformableFunction):  # not rotate.register_autograd, which refuses torch.func
    @staticmethod
    def forward(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
        return rotate(x, factor, block, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        x, ctx.factor, ctx.block, ctx.dtype = inputs
        ctx.input_dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return rotation(grads[0].contiguous(), ctx.factor, ctx.block, ctx.input_dtype), None, None, None


def rotation(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """`rotate`, differentiable any number of times."""
    return apply(_Rotation, x, factor, block, dtype)
