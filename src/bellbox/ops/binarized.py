"""The product of binarized weights with inputs of up to 8 bits: the weights stay signs and bits.

A row of a block of columns is seven fp16 numbers (`bellbox/core/binarize.py`), and its product with rounded inputs is
these seven times seven integers: sums of the inputs over the columns of a group, and sums with the signs. So the
compiled kernel reads 2.9 bits a weight where decoded weights are 32.

Pinned: the integers are exact, and for each output, in fp32, block after block and in the order of the scales,
`sum += scale * float(integer)`; at the end `sum * input scale`, then `+ bias`. `reference` is that in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.core import packing
from bellbox.ops import native
from bellbox.ops.dispatch import is_direct

MAX_ROWS = {"avx2": 8, "avx512": 32, "amx": 32}
"""By instruction set: more rows are faster with decoded weights (docs/ptq.md), as is any number on others."""
MAX_BITS = 8
"""Of the inputs."""


def serves(x: Tensor, bits: int) -> bool:
    """Whether the kernel takes this input, and is the faster way with the instruction set in use.

    Args:
        x: `[..., features]`, at least one dimension.
        bits: that its values are rounded to.
    """
    return (
        is_direct(x)
        and x.is_cpu
        and x.dtype == torch.float32
        and bits <= MAX_BITS
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and native.available()
        and 0 < x.numel() <= MAX_ROWS.get(native.isa(), 0) * x.shape[-1]
    )


class Planes:
    """A binarized matrix in the layout of the kernel (native/kernels/kernels.h).

    Args:
        signs: bool `[out, in]`.
        bits: bool `[out, in]`: second signs of salient columns, groups of the others.
        salient: bool `[in]`.
        scales: fp16 `[out, blocks, 7]`.
        block: columns that share scales.
        bias: fp32 `[out]`, or None.
    """

    def __init__(
        self, signs: Tensor, bits: Tensor, salient: Tensor, scales: Tensor, block: int, bias: Tensor | None
    ) -> None:
        self.rows, self.columns = signs.shape
        self.blocks = scales.shape[1]
        self.bias = None if bias is None else bias.detach().contiguous()
        order, steps = _ordered(salient, block)
        self.order, self.steps = order.to(torch.int32), steps
        self.planes = torch.stack((_words(signs, order), _words(bits, order)), 2)
        self.scales = (
            F.pad(scales, (0, 0, 0, 0, 0, -self.rows % 16))
            .unflatten(0, (-1, 16))
            .permute(0, 2, 3, 1)
            .contiguous()
        )

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        """Round each row of the input and multiply; a row that is not finite gives NaN.

        Args:
            x: fp32 `[..., in]`, on the CPU.
            bits: 2 to 8; the largest magnitude of a row becomes 2^(bits-1) - 1.

        Returns:
            fp32 `[..., out]`.
        """
        module = native.compiled()
        assert module is not None
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], self.rows))
        module.binarized(
            self.planes,
            self.scales,
            self.steps,
            self.order,
            self.bias,
            self.rows,
            self.columns,
            x.detach(),
            2 ** (bits - 1) - 1,
            out,
            torch.get_num_threads(),
        )
        return out


def _ordered(salient: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Which column each place of the steps takes (the number of columns for none), and steps `[blocks, 2]`."""
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
    """uint8 `[tiles, steps, 8]`: bit 4 r + c of a step is row r of 16, column c of 4."""
    padded = F.pad(bits, (0, 1, 0, -len(bits) % 16))[:, order].to(torch.uint8)
    grouped = padded.view(len(padded) // 16, 16, len(order) // 4, 4).transpose(1, 2)
    return packing.pack(grouped.reshape(-1, 64), 2).view(grouped.shape[0], -1, 8)


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
        signs: as in `Planes`, like all that follows.
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
