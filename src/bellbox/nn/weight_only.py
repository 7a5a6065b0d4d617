"""The linear layer for inference whose weight alone is codes: inputs stay floats, and so does the product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.core import packing
from bellbox.core.grid import Grid
from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError
from bellbox.nn.coded import CodedLayer
from bellbox.nn.input_cache import keeping_dtype
from bellbox.nn.quantized import QuantizedLayer
from bellbox.ops.decode_bytes import decode_bytes
from bellbox.ops.dispatch import is_direct
from bellbox.ops.encode import result_dtype
from bellbox.quantizers.base import rotate_vectors


class _Bytes(NamedTuple):
    """The codes of each byte."""

    codes: Tensor
    """int64 `[256, codes of a byte]`; what stands in no file is the last code."""
    numbers: Tensor
    """fp32, what they stand for on the grid."""


@functools.cache
def _values_of_bytes(grid: Grid) -> _Bytes | None:
    """None where codes straddle bytes."""
    n = grid.n
    per_byte = packing.digits_per_byte(n) or (
        8 // packing.code_width(n) if 8 % packing.code_width(n) == 0 else 0
    )
    if not per_byte:
        return None
    codes = packing.unpack(torch.arange(256, dtype=torch.uint8, device="cpu")[:, None], per_byte, n).clamp(
        max=n - 1
    )
    return _Bytes(codes.long(), grid.decode(codes))


class WeightOnlyMatrix(CodedLayer):
    """A layer that multiplies its input, rotated where the weight is, with the decoded weight.

    Its buffers: `packed` uint8 `[out, row bytes]`, codes as files hold them; `weight_scale` fp32 `[out]`, or
    `[out, groups]` where columns share scales in groups; `weight_table` fp32 `[n]`, the values of the codes where they
    are not evenly spaced; `act_signs` int8 `[in]` (where there are signs); `bias` fp32 `[out]`.

    Args:
        in_features: length of the last dimension of the input.
        out_features: length of the last dimension of the output.
        weight_levels: how many codes there are, and the integers that they stand for where there is no table.
        bias: whether there is a bias.
        group: columns that share a scale, a divisor of `in_features`; None for a scale a row.
        table: whether the values of the codes are a table.
        block: rotation block.
        signs: whether entries of the input change sign before the rotation.
    """

    packed: Tensor
    weight_scale: Tensor
    weight_table: Tensor | None
    act_signs: Tensor | None
    bias: Tensor | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_levels: Grid,
        bias: bool,
        *,
        group: int | None = None,
        table: bool = False,
        block: int = 1,
        signs: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.row_length, self.row_count = in_features, out_features
        self.weight_levels, self.scale_group, self.block = weight_levels, group, block
        n = weight_levels.n
        size = packing.row_bytes(in_features, n)
        scales = (out_features,) if group is None else (out_features, in_features // group)
        self.register_buffer("packed", torch.zeros(out_features, size, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(scales))
        self.register_buffer("weight_table", torch.zeros(n) if table else None)
        self.register_buffer("act_signs", torch.ones(in_features, dtype=torch.int8) if signs else None)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_quantized(cls, layer: QuantizedLayer) -> Self:
        """Pack a trained layer whose weight alone is quantized.

        Raises:
            BellboxError: its weight is not quantized, or holds NaN or infinity.
        """
        quantizer = layer.weight_quantizer
        codes, row_scales = layer.encoded_weight()
        assert quantizer is not None
        with torch.no_grad():
            scales = quantizer.packed_scales(layer.weight_rows().detach(), row_scales)
            table = quantizer.table()
        grouped = scales.dim() == 2
        device = layer.stored_weight.device
        with torch.device(device):
            made = cls(
                layer.row_length,
                layer.row_count,
                quantizer.levels.grid,
                layer.bias is not None,
                group=layer.row_length // scales.shape[1] if grouped else None,
                table=table is not None,
                block=quantizer.block,
                signs=quantizer.signs is not None,
            )
        made.packed = packing.pack(codes, quantizer.levels.n)
        made.weight_scale = scales.contiguous()
        made.weight_table = None if table is None else table.detach().to(device, torch.float32, copy=True)
        made.act_signs = None if quantizer.signs is None else quantizer.signs.clone()
        made.bias = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)  # pyright: ignore[reportAttributeAccessIssue]
        made.quantization_method = quantizer.method
        return made.train(layer.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.row_length}, out_features={self.row_count}, bias={self.bias is not None}, "
            f"weight_levels={self.weight_levels.n}, group={self.scale_group}"
        )

    # --- the weight ---

    @property
    def stored_codes(self) -> Tensor:
        """See `CodedLayer`."""
        return self.packed

    @property
    def weight_packed(self) -> Tensor:
        """See `CodedLayer`."""
        return self.packed

    def fill_from_rows(self, rows: Tensor) -> None:
        """See `CodedLayer`."""
        self.packed = rows

    def weight_codes(self) -> Tensor:
        """See `CodedLayer`."""
        return packing.unpack(self.packed, self.row_length, self.weight_levels.n)

    @torch.no_grad()
    def decoded_rows(self) -> Tensor:
        """fp32 `[out, in]`, in the domain that the input is rotated into."""
        table = self.weight_table
        values = _values_of_bytes(self.weight_levels) if is_direct(self.packed) else None
        if values is not None and self.packed.is_cpu:
            numbers = values.numbers if table is None else table[values.codes]
            scale = self.weight_scale if self.scale_group is not None else self.weight_scale[:, None]
            return decode_bytes(self.packed, numbers, scale, self.row_length)
        codes = self.weight_codes()
        values = self.weight_levels.decode(codes) if table is None else table[codes.int()]
        if self.scale_group is None:
            return values * self.weight_scale[:, None]
        grouped = values.view(self.row_count, -1, self.scale_group)
        return (grouped * self.weight_scale.unsqueeze(-1)).view(self.row_count, self.row_length)

    @torch.no_grad()
    def decoded_weight(self) -> Tensor:
        """See `CodedLayer`."""
        rows = hadamard(self.decoded_rows(), self.block)
        return rows if self.act_signs is None else rows * self.act_signs

    def _weight_shape(self) -> tuple[int, ...]:
        return self.row_count, self.row_length

    # --- running ---

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[..., in_features]` to `[..., out_features]`, in the input's dtype or that of autocast, differentiable.

        Raises:
            BellboxError: another last dimension, or no floats.
        """
        if x.shape[-1:] != (self.row_length,) or not x.is_floating_point():
            raise BellboxError(
                f"a weight-only layer of {self.row_length} inputs got shape {tuple(x.shape)}, dtype {x.dtype}"
            )
        dtype = result_dtype(x)
        x = x if self.act_signs is None else x * self.act_signs
        rotated = rotate_vectors(x, self.block).to(dtype)
        return F.linear(
            rotated, self.decoded_rows().to(dtype), None if self.bias is None else self.bias.to(dtype)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices, never a change of dtype: scales are stored in fp32."""
        return super()._apply(keeping_dtype(fn), recurse)


class WeightOnlyLinear(WeightOnlyMatrix, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """A linear layer with a weight of codes; see `WeightOnlyMatrix` for the arguments."""

    plain_kind = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, weight_levels: Grid, bias: bool, **more: Any
    ) -> None:
        super().__init__(in_features, out_features, weight_levels, bias, **more)
        self.in_features, self.out_features = in_features, out_features
