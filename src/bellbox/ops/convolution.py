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


def convolves_pixels(weight: Grid, activation: Grid) -> int:
    """How many codes `pixel_addresses` join, where `convolve` is faster with them for such levels; else 0.

    That is a matter of the instruction set in use: three with AVX-512, two with AVX2.
    """
    module = native.compiled()
    serves = module is not None and 2 < weight.n <= 4 and activation.n <= 4
    return module.convolves_pixels() if module is not None and serves else 0


def pixel_addresses(codes: Tensor, joined: int) -> Tensor:
    """Filters as rows of the kernel's table of products (`native/kernels/kernels.h`, PixelArgs).

    Args:
        codes: uint8 `[filters, places of the geometry, channels]`, below 4.
        joined: codes of as many channels make a number (`convolves_pixels`).

    Returns:
        int16 `[ceil(filters / 16) * 2, lookups, 8]`: for 8 filters each, `4 ** joined` times the numbers that the codes
        of `joined` channels make; `lookups` is places times `ceil(channels / joined)`, up to a multiple of 8.
    """
    filters, places, channels = codes.shape
    tuples = -(-channels // joined)
    digits = F.pad(codes.to(torch.int16), (0, joined * tuples - channels))
    worth = codes.new_tensor([4 ** (joined + digit) for digit in range(joined)], dtype=torch.int16)
    numbers = (digits.view(filters, places, joined, tuples) * worth[:, None]).sum(2, dtype=torch.int16)
    numbers = F.pad(numbers.flatten(1), (0, -places * tuples % 8, 0, -filters % 16))
    return numbers.view(-1, 8, numbers.shape[1]).transpose(1, 2).contiguous()
