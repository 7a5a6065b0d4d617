"""Launches on rows whose normaliser is given: rotation, codes, and what training keeps and computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.kernels import rows as _kernels
from bellbox.ops.backends.triton.launch.shared import OPTIONS, stages, step, stored, table
from bellbox.ops.kept import MOST, STEPS, stepped
from bellbox.ops.preconditions import check_rows

# A function of Triton is launched by its subscript, which no type checker knows.
kernels: Any = _kernels


def _by_piece(x: Tensor, block: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes of a kernel whose programs share out a row."""
    columns = x.shape[-1]
    size = plan.piece(columns, block)
    grid = x.numel() // columns, -(-columns // size)
    return grid, {"SIZE": size, "num_warps": plan.warps(size), **OPTIONS}


def row_rms(x: Tensor) -> Tensor:
    """See `bellbox.ops.encode.row_rms`."""
    out = x.new_empty((len(x), 1), dtype=torch.float64)
    size = min(plan.power_of_two(x.shape[1]), 4096)
    options = {"num_warps": plan.warps(size), **OPTIONS}
    kernels.row_rms[(len(x),)](x.contiguous(), out, x.shape[1], SIZE=size, **options)
    return out


def rotate(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """See `bellbox.ops.rotate`."""
    check_rows(x, block)
    out = torch.empty(x.shape, dtype=stored(dtype), device=x.device)
    grid, options = _by_piece(x, block)
    kernels.rotate[grid](x.contiguous(), out, factor, x.shape[-1], STAGES=stages(block), **options)
    return out.to(dtype)


def encode(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    """See `bellbox.ops.encode`."""
    check_rows(x, block, r)
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    grid, options = _by_piece(x, block)
    kernels.encode[grid](
        x.contiguous(), r.contiguous(), table(tuple(thresholds), x.device), out, x.shape[1], step(r),
        STAGES=stages(block), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out


def keep(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    """See `bellbox.ops.kept`."""
    check_rows(x, block, r)
    cuts = stepped(thresholds)
    assert cuts is not None
    starts = (-float(MOST), *(STEPS * cut for cut in cuts))
    ends = (*(start - 1 for start in starts[1:]), float(MOST))
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid, options = _by_piece(x, block)
    tables = (table(tuple(each), x.device) for each in (thresholds, starts, ends))
    kernels.keep[grid](
        x.contiguous(), r.contiguous(), *tables, out, x.shape[1], step(r),
        STAGES=stages(block), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out


def kept_codes(kept: Tensor, thresholds: Sequence[float]) -> Tensor:
    """See `bellbox.ops.kept`."""
    out = torch.empty(kept.shape, dtype=torch.uint8, device=kept.device)
    size = min(plan.power_of_two(kept.numel()), 4096)
    kernels.kept_codes[(-(-kept.numel() // size),)](
        kept.contiguous(), table(tuple(thresholds), kept.device), out, kept.numel(),
        SIZE=size, LEVELS=len(thresholds) + 1, num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    return out


def decode_kept(
    kept: Tensor, scale: Tensor, thresholds: Sequence[float], offset: float, dtype: torch.dtype
) -> Tensor:
    """See `bellbox.ops.kept`."""
    if scale.numel() not in (1, len(kept)):
        raise BellboxError(f"{tuple(scale.shape)} scales do not fit {len(kept)} rows")
    out = torch.empty(kept.shape, dtype=stored(dtype), device=kept.device)
    grid, options = _by_piece(kept, 1)
    kernels.decode_kept[grid](
        kept.contiguous(), scale.contiguous(), table(tuple(thresholds), kept.device), out, float(offset),
        kept.shape[1], step(scale), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out.to(dtype)


def bbq_forward(
    x: Tensor,
    r: Tensor,
    scale: Tensor,
    thresholds: Sequence[float],
    offset: float,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `bellbox.ops.fake_quantize.reference_forward`."""
    check_rows(x, block, r, scale)
    out, value = (torch.empty(x.shape, dtype=stored(dtype), device=x.device) for _ in range(2))
    grid, options = _by_piece(x, block)
    kernels.forward[grid](
        x.contiguous(), r.contiguous(), scale.contiguous(), table(tuple(thresholds), x.device), out, value,
        float(offset), x.shape[1], step(r), step(scale),
        STAGES=stages(block), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out.to(dtype), value.to(dtype)


def _backward(
    grad: Tensor, value: Tensor, levels: Tensor, of_rows: tuple[Tensor, Tensor, Tensor], block: int,
    dtype: torch.dtype, thresholds: Sequence[float] = (0.0,), offset: float = 0.0, kept: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_rows(grad, block, *of_rows)
    if not grad.shape == value.shape == levels.shape:
        raise BellboxError(f"a gradient {tuple(grad.shape)} does not fit what was kept, {tuple(value.shape)}")
    r, gamma, free = (each.contiguous() for each in of_rows)
    out = torch.empty(grad.shape, dtype=stored(dtype), device=grad.device)
    dots = grad.new_empty((len(grad), 1), dtype=torch.float32)
    size, whole = plan.whole_row(grad.shape[1], block)
    kernels.backward[(len(grad),)](
        grad.contiguous(), value.contiguous(), levels.contiguous(), table(tuple(thresholds), grad.device),
        r, gamma, free, out, dots, float(offset), grad.shape[1], step(r), step(gamma), step(free),
        SIZE=size, WHOLE=whole, STAGES=stages(block), KEPT=kept, LEVELS=len(thresholds) + 1,
        num_warps=plan.row_warps(size), **OPTIONS,
    )  # fmt: skip
    return out.to(dtype), dots


def bbq_backward(
    grad: Tensor,
    v: Tensor,
    x_hat: Tensor,
    r: Tensor,
    gamma: Tensor,
    free: Tensor,
    block: int,
    whole_tensor: bool,
) -> tuple[Tensor, Tensor]:
    """See `bellbox.ops.fake_quantize.reference_backward`; sigma of each row."""
    assert not whole_tensor
    return _backward(grad, v, x_hat, (r, gamma, free), block, grad.dtype)


def bbq_backward_kept(
    grad: Tensor, kept: Tensor, r: Tensor, gamma: Tensor, free: Tensor, thresholds: Sequence[float], offset: float,
    block: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `bellbox.ops.kept.bbq_backward_kept`."""
    return _backward(grad, kept, kept, (r, gamma, free), block, dtype, thresholds, offset, kept=True)
