"""The rotation alone, as a custom operation: for what is not coded right after it.

A weight-only layer rotates its input and multiplies floats; a backward pass rotates gradients back. The transform is
symmetric, so its gradient is itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bellbox.core.hadamard import butterfly_between
from bellbox.ops import native
from bellbox.ops.encode import Scratch, chunks, compute_dtype
from bellbox.ops.transforms import TransformableFunction, apply


@torch.library.custom_op("bellbox::rotate", mutates_args=())
def rotate(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """`butterfly(x) * factor`, additions and product in fp32 (fp64 for fp64 input), rounded to `dtype` once.

    Args:
        x: `[..., features]`, any floating dtype.
        factor: `block**-0.5` gives the orthonormal transform.
        block: a power of two that divides `features`.
        dtype: of the result.

    Returns:
        A new tensor with the shape of `x`.
    """
    if native.serves(x, 2) and dtype in (torch.float32, torch.bfloat16):
        return native.rotate(x, factor, block, dtype)
    return reference_rotate(x, factor, block, dtype)


def reference_rotate(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """`rotate` in plain torch."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    wide, flat, target = compute_dtype(x), x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    scratch = Scratch(flat, 2, wide)
    for rows in chunks(flat):
        values = flat[rows].to(wide).contiguous()
        a, b = scratch.rows(rows)
        rotated = butterfly_between(values, block, (a, b)) if block > 1 else values
        target[rows] = torch.mul(rotated, factor)
    return out


@rotate.register_fake
def _(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@rotate.register_vmap
def _(_info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return rotate(x.movedim(in_dims[0] or 0, 0).contiguous(), *rest), 0


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
