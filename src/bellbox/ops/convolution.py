"""Convolutions with the compiled kernels: a sample is coded, and what each geometry sees multiplied, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.core.grid import Grid
from bellbox.ops import native


def convolve(
    x: Tensor,
    geometry: Sequence[int],
    weights: native.Weights,
    code_sums: Tensor,
    addresses: Tensor | None,
    act_scale: float,
    coding: native.Coding,
    dtype: torch.dtype,
    add: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Code samples, and multiply what each geometry sees of their integers, in one call.

    Args:
        x: `[batch, channels, height, width]`, fp32 or bf16, on the CPU; without a copy where it lies channels last.
        geometry: height, width, channels of the input, height and width of the output, height and width of the kernel,
            strides and dilations likewise, zeros on the left and on top, and 1 where any patch reaches beyond the
            image, else 0.
        weights: a matrix with `kernel height * kernel width * channels` columns.
        code_sums: int32 `[kernel height * kernel width, rows of weights]`: of the codes at each place of the geometry.
        addresses: `pixel_addresses` of the weights, or None: without them the kernels gather patches.
        act_scale: what one integer of the activation is worth.
        coding: of a sample.
        dtype: of the result, fp32 or bf16.
        add: to be added to the result, of its shape and layout, or None. Needs fp32, as does
        relu: whether a ReLU comes last.

    Returns:
        `[batch, rows of weights, out height, out width]`, channels last in memory.
    """
    module = native.compiled()
    assert module is not None
    x = x.contiguous(memory_format=torch.channels_last)
    size = len(x), weights.rows, geometry[3], geometry[4]
    out = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if add is not None:
        add = add.contiguous(memory_format=torch.channels_last)
        assert add.shape == out.shape
        assert add.dtype == torch.float32
    module.convolution(
        x.data_ptr(),
        native.TYPES[x.dtype],
        len(x),
        coding.handle,
        geometry,
        weights.handle,
        code_sums.data_ptr(),
        0 if addresses is None else addresses.data_ptr(),
        act_scale,
        out.data_ptr(),
        native.TYPES[dtype],
        0 if add is None else add.data_ptr(),
        relu,
        torch.get_num_threads(),
    )
    return out


def convolves_pixels(weight: Grid, activation: Grid) -> bool:
    """Whether `convolve` is faster with `pixel_addresses` on the instruction set in use, for such levels."""
    module = native.compiled()
    return module is not None and 2 < weight.n <= 4 and activation.n <= 4 and module.convolves_pixels()


def pixel_addresses(codes: Tensor) -> Tensor:
    """Filters as rows of the kernel's table of products (`native/kernels/kernels.h`, PixelArgs).

    Args:
        codes: uint8 `[filters, places of the geometry, channels]`, below 4.

    Returns:
        int16 `[ceil(filters / 16) * 2, lookups, 8]`: for 8 filters each, 64 times the numbers that codes of three
        channels make; `lookups` is places times `ceil(channels / 3)`, up to a multiple of 8.
    """
    filters, places, channels = codes.shape
    triples = -(-channels // 3)
    digits = F.pad(codes.to(torch.int16), (0, 3 * triples - channels)).view(filters, places, 3, triples)
    numbers = (digits * codes.new_tensor([64, 256, 1024], dtype=torch.int16)[:, None]).sum(
        2, dtype=torch.int16
    )
    numbers = F.pad(numbers.flatten(1), (0, -places * triples % 8, 0, -filters % 16))
    return numbers.view(-1, 8, numbers.shape[1]).transpose(1, 2).contiguous()
