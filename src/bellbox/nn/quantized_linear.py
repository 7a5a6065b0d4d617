"""The linear layer for training: full-precision weight, fake-quantized with its input in every forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.nn.quantized import QuantizedLayer, turned_vectors
from bellbox.ops.encode import result_dtype
from bellbox.ops.packed_linear import Bound


class QuantizedMatrix(QuantizedLayer):
    """A layer that multiplies rows of its input with a matrix, `[out, in]` where it does not say otherwise."""

    def rows_of(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def turned(self, weight: Tensor, back: bool = False) -> Tensor:
        """See `QuantizedLayer.turned`."""
        quantizer = self.rotating_quantizer
        return weight if quantizer is None else turned_vectors(weight, quantizer, back)

    def _dequantized(self, x: Tensor) -> Tensor:
        """`[..., row_length]` to `[..., row_count]`."""
        weight, activation = self._quantized_rows(), self.activation_quantizer
        if activation is not None:
            x = activation(x, self)
        elif self.weight_quantizer is not None:
            x = self.weight_quantizer.rotate(x)
        return F.linear(x, weight, self.bias)

    def _bind(self, buffers: dict[str, Tensor | None]) -> Callable[..., Tensor]:
        return Bound(buffers, self.packed_numbers())

    def _integer(self, x: Tensor) -> Tensor:
        assert self.activation_quantizer is not None
        self.activation_quantizer.observe(x, self)
        with torch.no_grad():
            return self.packed_call(x)(x, result_dtype(x))


class QuantizedLinear(QuantizedMatrix, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """`nn.Linear` whose weight and input are fake-quantized; see `QuantizedLayer` for the arguments."""

    plain_kind = nn.Linear

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
