"""The product of binarized weights with inputs of up to 8 bits: the weights stay signs and bits.

A row of a block of columns is seven fp16 numbers (`bellbox/core/binarize.py`), and its product with rounded inputs is
these seven times seven integers: sums of the inputs over the columns of a group, and sums with the signs. So the
compiled kernel reads 2.9 bits a weight where decoded weights are 32.

Pinned: the integers are exact, and for each output, in fp32, block after block and in the order of the scales,
`sum += scale * float(integer)`; at the end `sum * input scale`, then `+ bias`. `reference` is that in torch.

The weights come in the layout of the kernels: salient columns of a block first, each part filled up to steps of four
columns; 16 rows a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.core import packing
from bellbox.errors import BellboxError
from bellbox.ops import native
from bellbox.ops.dispatch import Operation

MAX_ROWS = {"avx2": 8, "avx512": 32, "amx": 32}
"""By instruction set: more rows are faster with decoded weights (docs/ptq.md), as is any number on others."""
MAX_BITS = 8
"""Of the inputs."""
TILE = 16
"""Rows of the weight that lie together."""


class Planes(NamedTuple):
    """A binarized matrix in the layout of the kernels (native/kernels/kernels.h)."""

    planes: Tensor
    """uint8 `[tiles, steps, 2, 8]`, signs and bits: bit 4 r + c of a step is row r of 16, column c of 4."""
    scales: Tensor
    """fp16 `[tiles, blocks, 7, 16]`."""
    order: Tensor
    """int32 `[4 * steps]`: which column each place takes, the number of columns for none."""
    steps: Tensor
    """int32 `[blocks, 2]`: steps of a block's salient columns, and of its others."""


def lay_out(signs: Tensor, bits: Tensor, salient: Tensor, scales: Tensor, block: int) -> Planes:
    """The layout of a matrix.

    Args:
        signs: bool `[out, in]`.
        bits: bool `[out, in]`: second signs of salient columns, groups of the others.
        salient: bool `[in]`.
        scales: fp16 `[out, blocks, 7]`.
        block: columns that share scales.
    """
    order, steps = _ordered(salient, block)
    tiled = F.pad(scales, (0, 0, 0, 0, 0, -len(scales) % TILE)).unflatten(0, (-1, TILE)).permute(0, 2, 3, 1)
    planes = torch.stack((_words(signs, order), _words(bits, order)), 2)
    return Planes(planes, tiled.contiguous(), order.to(torch.int32), steps)


def empty_layout(rows: int, columns: int, block: int) -> Planes:
    """The layout of a matrix of zeros without salient columns, on the default device."""
    salient = torch.zeros(columns, dtype=torch.bool, device="cpu")
    order, steps = (one.to(torch.empty(0).device) for one in _ordered(salient, block))
    tiles = -(-rows // TILE)
    return Planes(
        torch.zeros(tiles, len(order) // 4, 2, 8, dtype=torch.uint8),
        torch.zeros(tiles, len(steps), 7, TILE, dtype=torch.float16),
        order.to(torch.int32),
        steps,
    )


def read_back(laid: Planes, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `lay_out` was given: signs, bits, salient columns and scales."""
    tiles, count = laid.planes.shape[:2]
    order = laid.order.long()
    grouped = packing.unpack(laid.planes.reshape(-1, 8), 64, 2).view(tiles, count, 2, TILE, 4)
    flat = grouped.permute(2, 0, 3, 1, 4).reshape(2, tiles * TILE, 4 * count)[:, :rows]
    whole = flat.new_zeros(2, rows, columns + 1).index_copy(2, order, flat)[:, :, :columns].bool()
    first = torch.ones_like(laid.steps) * torch.tensor([1, 0], device=order.device)
    marks = first.reshape(-1).repeat_interleave(4 * laid.steps.reshape(-1).long(), output_size=len(order))
    salient = marks.new_zeros(columns + 1).index_copy(0, order, marks)[:columns].bool()
    scales = laid.scales.permute(0, 3, 1, 2).reshape(tiles * TILE, -1, laid.scales.shape[2])[:rows]
    return whole[0], whole[1], salient, scales.contiguous()


def _ordered(salient: Tensor, block: int) -> tuple[Tensor, Tensor]:
    order: list[Tensor] = []
    steps: list[int] = []
    for first in range(0, len(salient), block):
        here = salient[first : first + block]
        for part in (here, ~here):
            columns = part.nonzero()[:, 0] + first
            order.append(F.pad(columns, (0, -len(columns) % 4), value=len(salient)))
            steps.append(len(order[-1]) // 4)
    return torch.cat(order), salient.new_tensor(steps, dtype=torch.int32).view(-1, 2)


def _words(bits: Tensor, order: Tensor) -> Tensor:
    padded = F.pad(bits, (0, 1, 0, -len(bits) % TILE))[:, order].to(torch.uint8)
    grouped = padded.view(len(padded) // TILE, TILE, len(order) // 4, 4).transpose(1, 2)
    return packing.pack(grouped.reshape(-1, 64), 2).view(grouped.shape[0], -1, 8)


def _most_rows() -> int:
    return MAX_ROWS.get(native.isa(), 0) if native.available() else 0


# As `torch.compiler.assume_constant_result` does, which would bring the whole compiler with it.
_most_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]


def is_faster(x: Tensor, bits: int) -> bool:
    """Whether the kernel takes this input, and is the faster way with the instruction set in use.

    Args:
        x: `[..., features]`, at least one dimension.
        bits: that its values are rounded to.
    """
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and bits <= MAX_BITS
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and 0 < x.numel() <= _most_rows() * x.shape[-1]
    )


def reference(
    integers: Tensor,
    input_scale: Tensor,
    signs: Tensor,
    bits: Tensor,
    salient: Tensor,
    scales: Tensor,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    """What the kernel computes, in torch and with the same bits.

    Args:
        integers: int8 `[m, in]`, the rounded inputs.
        input_scale: fp32 `[m, 1]`, what one of them is worth.
        signs: as in `lay_out`, like all that follows.
        bits: second signs, or groups.
        salient: which columns are binarized twice.
        scales: fp16 `[out, blocks, 7]`.
        block: columns that share scales.
        bias: or None.

    Returns:
        fp32 `[m, out]`.
    """
    total = input_scale.new_zeros(len(integers), len(signs))
    for number, first in enumerate(range(0, signs.shape[1], block)):
        here = slice(first, first + block)
        sign, bit = (2.0 * plane[:, here].double() - 1 for plane in (signs, bits))
        twice, group = salient[here].double(), bits[:, here].double()
        x = integers[:, here].double()
        plain, other = x * (1 - twice), x * twice
        sums = (  # of the integers: exact in fp64
            plain @ (1 - group).T,
            plain @ (sign * (1 - group)).T,
            plain @ group.T,
            plain @ (sign * group).T,
            other.sum(1, keepdim=True),
            other @ sign.T,
            other @ bit.T,
        )
        for at, one in enumerate(sums):
            total = total + scales[:, number, at].float() * one.float()
    total = total * input_scale
    return total if bias is None else total + bias


def check(
    x: Tensor, planes: Tensor, scales: Tensor, order: Tensor, steps: Tensor, bias: Tensor | None, rows: int,
    block: int, bits: int,
) -> None:  # fmt: skip
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: naming the argument.
    """
    columns = x.shape[-1] if x.dim() else 0
    blocks, count = -(-columns // max(1, block)), order.numel() // 4
    for ok, what in (
        (
            x.dtype == torch.float32 and columns >= 1,
            f"the input is {x.dtype} {tuple(x.shape)}: fp32 [..., in]",
        ),
        (rows >= 1 and block >= 1, f"rows {rows}, block {block}: at least 1"),
        (2 <= bits <= MAX_BITS, f"bits {bits}: from 2 to {MAX_BITS}"),
        (
            steps.dtype == order.dtype == torch.int32 and steps.shape == (blocks, 2) and order.dim() == 1,
            f"steps {tuple(steps.shape)}, order {tuple(order.shape)}: int32 [{blocks}, 2] and [4 * steps]",
        ),
        (
            bool((steps >= 0).all()) and int(steps.sum()) == count and order.numel() % 4 == 0,
            "steps do not add up to the order",
        ),
        (bool(((order >= 0) & (order <= columns)).all()), "the order names a column that is not there"),
        (
            planes.dtype == torch.uint8 and planes.shape == (-(-rows // TILE), count, 2, 8),
            f"planes are {planes.dtype} {tuple(planes.shape)}",
        ),
        (
            scales.dtype == torch.float16 and scales.shape == (-(-rows // TILE), blocks, 7, TILE),
            f"scales are {scales.dtype} {tuple(scales.shape)}",
        ),
        (
            bias is None or (bias.dtype == torch.float32 and bias.shape == (rows,)),
            f"bias is not fp32 [{rows}]",
        ),
    ):
        if not ok:
            raise BellboxError(f"binarized layer: {what}")


def _reference(
    x: Tensor, planes: Tensor, scales: Tensor, order: Tensor, steps: Tensor, bias: Tensor | None, rows: int,
    block: int, bits: int,
) -> Tensor:  # fmt: skip
    check(x, planes, scales, order, steps, bias, rows, block, bits)
    flat = x.reshape(-1, x.shape[-1])
    scale = flat.abs().amax(-1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
    integers = (flat / scale).round().nan_to_num_(0.0).clamp_(-127, 127).to(torch.int8)
    stored = read_back(Planes(planes, scales, order, steps), rows, flat.shape[1])
    out = reference(integers, scale, *stored, block, bias)
    broken = ~flat.isfinite().all(-1, keepdim=True)
    return out.masked_fill(broken, float("nan")).reshape(*x.shape[:-1], rows)


def _fake(
    x: Tensor, planes: Tensor, scales: Tensor, order: Tensor, steps: Tensor, bias: Tensor | None, rows: int,
    block: int, bits: int,
) -> Tensor:  # fmt: skip
    del planes, scales, order, steps, bias, block, bits
    return x.new_empty((*x.shape[:-1], rows))


operation = Operation(
    "binarized_linear(Tensor x, Tensor planes, Tensor scales, Tensor order, Tensor steps, Tensor? bias, int rows, "
    "int block, int bits) -> Tensor",
    _reference,
    _fake,
)
"""Round each row of fp32 `[..., in]` to `bits` (2 to 8; the largest magnitude becomes 2^(bits-1) - 1) and multiply:
fp32 `[..., rows]`. A row that is not finite gives NaN."""
