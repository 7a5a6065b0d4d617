"""Launches that write and read the layout of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bellbox.core.packing import code_width
from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.kernels import layout as _layout
from bellbox.ops.backends.triton.launch.shared import OPTIONS
from bellbox.ops.weight_layout import check_codes, check_packed, packed_size, tiles_size

# A function of Triton is launched by its subscript, which no type checker knows.
layout: Any = _layout


def prepack(codes: Tensor, levels: int, places: int) -> Tensor:
    """See `bellbox.ops.weight_layout`; a code too large for its bits is cut off rather than waited for and refused."""
    check_codes(codes, levels, places)
    rows, columns = codes.shape
    bits, blocks = code_width(levels), -(-columns // 64)
    codes = codes.contiguous()
    out = codes.new_empty(packed_size(rows, columns, levels, places))
    layout.prepack[(-(-rows // 16), blocks)](
        codes, out, rows, columns, blocks, BITS=bits, num_warps=2, **OPTIONS
    )
    if levels <= 4:
        sums = out[tiles_size(rows, columns, levels) :].view(torch.int32)
        for count, part in ((1, sums[:rows]), (places, sums[rows:])):
            if part.numel():
                size = min(plan.power_of_two(columns // count), 2048)
                layout.sums_of_rows[(rows, count)](
                    codes, part, rows, columns, count, SIZE=size, num_warps=plan.warps(size), **OPTIONS
                )
    return out


def unpack(weight: Tensor, rows: int, columns: int, levels: int) -> Tensor:
    """See `bellbox.ops.weight_layout`."""
    check_packed(weight, rows, columns, levels)
    codes = weight.new_empty(rows, columns)
    size = min(plan.power_of_two(columns), 1024)
    layout.unpack[(rows, -(-columns // size))](
        weight.contiguous(), codes, rows, columns, -(-columns // 64),
        SIZE=size, BITS=code_width(levels), num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    return codes
