"""transformers' `Conv1D`: a linear layer whose weight is `[in, out]`, as GPT-2 has it.

It is quantized as the linear layer that it is, rows of the weight being its columns; to its owner it stays a `Conv1D`
whose `weight.shape` is `[in, out]`. Nothing here imports transformers: a model that has such a layer did.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.grid import Grid
from bellbox.nn.coded import CodedLayer
from bellbox.nn.packed import InputCoding
from bellbox.nn.packed_linear import PackedMatrix
from bellbox.nn.quantized_linear import QuantizedMatrix
from bellbox.nn.weight_only import WeightOnlyMatrix


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is a `Conv1D`, a subclass of it, or a low-bit layer that was made of one."""
    return _own_class(type(module)) is not None


def computes_as_transposed_linear(module: nn.Module) -> bool:
    """Whether a `Conv1D` has that class's own forward."""
    own = _own_class(type(module))
    return own is not None and type(module).forward is own.forward


def transposed_sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a `Conv1D`."""
    weight: Any = module.weight
    return weight.shape[0], weight.shape[1]


def _own_class(kind: type[Any]) -> Any:
    own = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return own if own is not None and issubclass(kind, own) else None


class QuantizedTransposed(QuantizedMatrix):
    """A `Conv1D` whose weight and input are fake-quantized; see `QuantizedLayer` for the arguments."""

    plain_kind = nn.Module

    @property
    def row_count(self) -> int:
        """See `QuantizedLayer.row_count`."""
        return self.stored_weight.shape[1]

    @property
    def row_length(self) -> int:
        """See `QuantizedLayer.row_length`."""
        return self.stored_weight.shape[0]

    def rows_of(self, weight: Tensor) -> Tensor:
        """`[out, in]`, of memory of its own: sums over a row go in the order of a linear layer's."""
        return weight.T.contiguous()

    def turned(self, weight: Tensor, back: bool = False) -> Tensor:
        """See `QuantizedLayer.turned`."""
        return super().turned(weight.T.contiguous(), back).T


class _Transposed(CodedLayer):
    """What a layer of codes for a `Conv1D` shows of its weight: the shape that its owner knows."""

    plain_kind = nn.Module

    def _as_conv1d(self) -> None:
        self.nx, self.nf = self.row_length, self.row_count

    @torch.no_grad()
    def decoded_weight(self) -> Tensor:
        """See `CodedLayer`: fp32 `[in, out]`."""
        return super().decoded_weight().T  # type: ignore[safe-super]

    def _weight_shape(self) -> tuple[int, ...]:
        return self.row_length, self.row_count


class PackedTransposed(_Transposed, PackedMatrix):
    """A `Conv1D` of integers; see `PackedMatrix` for the arguments."""

    def __init__(
        self, in_features: int, out_features: int, weight_levels: Grid, coding: InputCoding, bias: bool
    ) -> None:
        super().__init__(in_features, out_features, weight_levels, coding, bias)
        self._as_conv1d()


class WeightOnlyTransposed(_Transposed, WeightOnlyMatrix):
    """A `Conv1D` with a weight of codes; see `WeightOnlyMatrix` for the arguments."""

    def __init__(
        self, in_features: int, out_features: int, weight_levels: Grid, bias: bool, **more: Any
    ) -> None:
        super().__init__(in_features, out_features, weight_levels, bias, **more)
        self._as_conv1d()
