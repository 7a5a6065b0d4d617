"""The linear layer for inference: codes only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from bellbox.core.grid import Grid
from bellbox.core.hadamard import hadamard
from bellbox.nn.packed import InputCoding, PackedLayer
from bellbox.nn.quantized import QuantizedLayer
from bellbox.ops.dispatch import Choice
from bellbox.ops.encode import result_dtype
from bellbox.ops.packed_linear import Bound, operation, with_signs


class PackedMatrix(PackedLayer):
    """A layer of integers that multiplies rows of its input with a matrix; see `PackedLayer` for its buffers.

    Args:
        in_features: length of the last dimension of the input.
        out_features: length of the last dimension of the output.
        weight_levels: the integers that weight codes stand for.
        coding: how the input is coded.
        bias: whether there is a bias.
    """

    def __init__(
        self, in_features: int, out_features: int, weight_levels: Grid, coding: InputCoding, bias: bool
    ) -> None:
        nn.Module.__init__(self)
        self._set_up(out_features, in_features, 1, weight_levels, coding, bias)

    @classmethod
    def like(cls, layer: QuantizedLayer, weight_levels: Grid, coding: InputCoding) -> Self:
        """See `PackedLayer.like`."""
        return cls(layer.row_length, layer.row_count, weight_levels, coding, layer.bias is not None)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.row_length}, out_features={self.row_count}, bias={self.bias is not None}, "
            f"weight_levels={self.weight_levels.n}, activation_levels={self.coding.levels.n}"
        )

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[..., in_features]` to `[..., out_features]`, without gradient."""
        dtype = result_dtype(x)
        if self.group.active:
            out = self.group.output(self, x, dtype)
            if out is not None:
                return out
        return (self._bound or self.bound)(x, dtype)

    def _bind(self) -> Bound:
        return Bound(self._buffers, self.numbers)

    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes `[rows, in_features]` of an input."""
        return self._input_codes_of(with_signs(x.detach().reshape(-1, self.row_length), self.act_signs))

    def _weight_shape(self) -> tuple[int, ...]:
        return self.row_count, self.row_length

    def _as_weight(self, rows: Tensor) -> Tensor:
        rows = hadamard(rows, self.coding.block)
        return rows if self.act_signs is None else rows * self.act_signs

    def explain(self) -> Choice:
        """See `PackedLayer.explain`."""
        x = torch.zeros(1, self.row_length, device=self.packed.device)
        return operation.choose((x, *self.bound.tensors(), *self.numbers, torch.float32))[1]


class PackedLinear(PackedMatrix, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """A linear layer of integers; see `PackedMatrix` for the arguments."""

    plain_kind = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, weight_levels: Grid, coding: InputCoding, bias: bool
    ) -> None:
        super().__init__(in_features, out_features, weight_levels, coding, bias)
        self.in_features, self.out_features = in_features, out_features


def bound_groups(groups: Iterable[Sequence[nn.Module]]) -> list[list[Bound]] | None:
    """The calls of a block's layers; None where one of a group is not packed, or codes its input differently."""
    calls: list[list[Bound]] = []
    for layers in groups:
        packed = [layer for layer in layers if isinstance(layer, PackedMatrix)]
        if len(packed) != len(layers) or any(not served_alike(layer, packed[0]) for layer in packed):
            return None
        calls.append([layer.bound for layer in packed])
    return calls


def served_alike(one: PackedMatrix, other: PackedMatrix) -> bool:
    """Whether two layers code their input alike, number for number."""
    if one.coding != other.coding:
        return False
    for name in ("act_thresholds", "act_rstd", "act_signs"):
        a, b = one._buffers[name], other._buffers[name]
        if a is not b and (a is None or b is None or not torch.equal(a, b)):
            return False
    return True
