"""The linear layer for training: full-precision weight, fake-quantized with its input in every forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.nn.integer_product import CodedWeight, integer_product, serves
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
        if self.trains_on_integers("cpu" if x.is_cpu else x.device.type, result_dtype(x)):
            return self._integer_product(x)
        weight, activation = self._quantized_rows(), self.activation_quantizer
        if activation is not None:
            x = activation(x, self)
        elif self.weight_quantizer is not None:
            x = self.weight_quantizer.rotate(x)
        return F.linear(x, weight, self.bias)

    def trains_on_integers(self, device: str, dtype: torch.dtype) -> bool:
        """See `QuantizedLayer.trains_on_integers`."""
        if not self.runs_on_integers:
            return False
        inputs, weight = self.activation_quantizer, self.weight_quantizer
        assert inputs is not None
        assert weight is not None
        return serves(weight, inputs.quantizer, self.integer_forward, device, dtype)

    def _integer_product(self, x: Tensor) -> Tensor:
        """`_dequantized` on integers (`nn.integer_product`)."""
        inputs, quantizer, held = self.activation_quantizer, self.weight_quantizer, self.held_weight
        assert inputs is not None
        assert quantizer is not None
        weight = held if isinstance(held, CodedWeight) else self.coded_weight()
        coded = inputs.coded(x, self)
        out = integer_product(coded, inputs.levels, weight, quantizer.levels, self.bias)
        return out.reshape(*x.shape[:-1], self.row_count)

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
