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


def _keep(ctx: Any, inputs: tuple[Tensor, float, int, torch.dtype], output: Tensor) -> None:
    x, ctx.factor, ctx.block, _ = inputs
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return rotate(grad.contiguous(), ctx.factor, ctx.block, ctx.dtype), None, None, None


rotate.register_autograd(_backward, setup_context=_keep)
