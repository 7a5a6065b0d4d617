"""Layers for training: full-precision weight, fake-quantized with its input in every forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.core.grid import Levels
from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError
from bellbox.nn.input_cache import InputCache, version_of
from bellbox.ops.encode import result_dtype
from bellbox.ops.integer import scaled_product
from bellbox.quantizers.base import Quantizer


class ActivationQuantizer(nn.Module):
    """An activation quantizer with its siblings' memory and its observers."""

    def __init__(self, quantizer: Quantizer, readers: int = 1) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.shared = InputCache(readers)
        self.observers: list[Callable[[Tensor], None]] = []

    @property
    def levels(self) -> Levels:
        """The integers that the quantizer uses."""
        return self.quantizer.levels

    @property
    def gamma(self) -> Tensor | None:
        """The learned scale, where the method has one."""
        return getattr(self.quantizer, "gamma", None)

    def forward(self, x: Tensor, reader: object = None) -> Tensor:
        """Fake-quantize `[..., features]` for a layer, differentiable."""
        return self.shared.get_or_compute(reader, x, ("fake", self.training), self._state(), self._fake)

    def integers(self, x: Tensor, reader: object = None) -> tuple[Tensor, Tensor]:
        """int8 integer levels `[rows, features]` and fp32 row_scales `[rows, 1]` of `[..., features]`, for a layer."""
        return self.shared.get_or_compute(reader, x, ("integers",), self._state(), self._integers)

    def _state(self) -> list[Tensor | None]:
        return [*self.quantizer._parameters.values(), *self.quantizer._buffers.values()]

    def _fake(self, x: Tensor) -> Tensor:
        if self.observers:
            self._observe(self.quantizer.codes(x))
        return self.quantizer(x)

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, row_scale = self.quantizer.encode(x)
        self._observe(codes)
        return self.levels.decode_int8(codes).reshape(-1, x.shape[-1]), row_scale.reshape(-1, 1)

    def _observe(self, codes: Tensor) -> None:
        for observer in self.observers:
            observer(codes)


class QuantizedLayer(nn.Module, ABC):
    """What fake-quantized linear layers and convolutions share: quantizers, codes of the weight, two ways forward.

    Args:
        layer: to take weight and bias from (shared with it, not copied).
        weight_quantizer: quantizer of the weight's rows, or None to leave it.
        activation_quantizer: of the input, or None to leave it. One that another layer owns is passed with
            `owned=False`, and then appears in the state dict under its owner only.
        owned: whether this layer registers the activation quantizer.
        weights_rotated: whether the weight lives in the domain that the input is rotated into; its own quantizer then
            does not rotate.

    Raises:
        BellboxError: two rotations that do not cancel.
    """

    activation_quantizer: ActivationQuantizer | None
    weight_quantizer: Quantizer | None
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        weight_quantizer: Quantizer | None,
        activation_quantizer: ActivationQuantizer | None,
        owned: bool = True,
        weights_rotated: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.weights_rotated = weight_quantizer, weights_rotated
        if owned:
            self.activation_quantizer = activation_quantizer
        else:
            # Past nn.Module's own bookkeeping: a borrowed quantizer must not be registered twice.
            object.__setattr__(self, "activation_quantizer", activation_quantizer)
        self.held_weight: Tensor | None = None
        """The fake-quantized weight's rows, while `nn.weights_quantized_once` holds them for several forwards."""
        self._cached: tuple[Tensor, int, Tensor, Tensor] | None = None
        if weights_rotated:
            _require_no_rotation(weight_quantizer, activation_quantizer)
        elif weight_quantizer is not None and activation_quantizer is not None:
            _require_same_rotation(weight_quantizer, activation_quantizer.quantizer)

    @property
    def runs_on_integers(self) -> bool:
        """Whether evaluation multiplies integers: both sides quantized to levels that fit int8."""
        activation = self.activation_quantizer
        pair = self.weight_quantizer, activation and activation.quantizer
        return all(q is not None and q.on_grid and q.levels.fits_int8 for q in pair)

    @property
    def row_count(self) -> int:
        """Outputs: rows of `weight_rows`."""
        return self.weight.shape[0]

    @property
    def row_length(self) -> int:
        """Weights of one output: columns of `weight_rows`."""
        return self.weight[0].numel()

    @abstractmethod
    def rows_of(self, weight: Tensor) -> Tensor:
        """A weight of this layer's shape as the matrix `[row_count, row_length]` that is quantized; differentiable."""

    def weight_rows(self) -> Tensor:
        """`rows_of` the weight."""
        return self.rows_of(self.weight)

    @property
    def rotating_quantizer(self) -> Quantizer | None:
        """The one whose rotation the layer works in: the input's, or the weight's where that alone is quantized."""
        inputs = self.activation_quantizer
        return self.weight_quantizer if inputs is None else inputs.quantizer

    @abstractmethod
    def rotated_weight(self, back: bool = False) -> Tensor:
        """The weight, in its own shape, in the domain that the input is rotated into; or the way back from there."""

    @abstractmethod
    def _dequantized(self, x: Tensor) -> Tensor:
        """The forward of training: fake-quantized floats."""

    @abstractmethod
    def _integer(self, x: Tensor) -> Tensor:
        """The forward of evaluation: integers, as the packed layer multiplies them."""

    @abstractmethod
    def unquantized(self) -> nn.Module:
        """The plain layer with this one's weight and bias, the same objects."""

    def vectors_of(self, x: Tensor) -> Tensor:
        """The input as the activation quantizer takes it."""
        return x

    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes of an input, in the shape of `vectors_of`; the input must be quantized."""
        assert self.activation_quantizer is not None
        return self.activation_quantizer.quantizer.codes(self.vectors_of(x))

    def weight_codes(self) -> Tensor:
        """uint8 codes of the weight, `[row_count, row_length]`, in the rotated domain.

        Raises:
            BellboxError: the weight is not quantized, or holds NaN or infinity.
        """
        return self.encoded_weight()[0]

    def encoded_weight(self) -> tuple[Tensor, Tensor]:
        """`weight_codes`, and what the scale of each row is multiplied with: fp32 `[row_count, 1]`.

        Raises:
            BellboxError: the weight is not quantized, or holds NaN or infinity.
        """
        if self.weight_quantizer is None:
            raise BellboxError("the weight of this layer is not quantized")
        codes, row_scales = self.weight_quantizer.encode(self.weight_rows())
        if bool(row_scales.isnan().any()):
            raise BellboxError(
                f"the weight of {self.weight_quantizer.name or 'a layer'} holds NaN or infinity"
            )
        return codes, row_scales

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in training from fake-quantized floats, in evaluation from integers."""
        if self.training or not self.runs_on_integers:
            return self._dequantized(x)
        exact = self._integer(x)
        if not torch.is_grad_enabled():
            return exact
        # Values of the integer path, gradient of the other: lin - lin is exactly zero.
        smooth = self._dequantized(x)
        return exact.detach() + (smooth - smooth.detach())

    def _quantized_rows(self) -> Tensor:
        """The fake-quantized rows of the weight; rotated only, where the input alone is quantized."""
        if self.held_weight is not None:
            return self.held_weight
        if self.weight_quantizer is not None:
            return self.weight_quantizer(self.weight_rows())
        # the rotations must cancel: what is not quantized is rotated all the same
        assert self.activation_quantizer is not None
        rows = self.weight_rows()
        quantizer = self.activation_quantizer.quantizer
        return quantizer.rotate(rows.reshape(len(rows), -1, quantizer.features)).reshape(rows.shape)

    @torch.no_grad()
    def _integer_weight(self) -> tuple[Tensor, Tensor]:
        """int8 rows and their scale, made anew only when the parameter has changed (a compiled graph cannot tell)."""
        assert self.weight_quantizer is not None
        if torch.compiler.is_compiling():
            integers, row_scale = self._integers_of_weight()
        else:
            version, cached = version_of(self.weight), self._cached
            if cached is None or cached[0] is not self.weight or cached[1] != version:
                cached = self._cached = (self.weight, version, *self._integers_of_weight())
            _, _, integers, row_scale = cached
        return integers, (integer_scale(self.weight_quantizer) * row_scale).reshape(-1)

    def _integers_of_weight(self) -> tuple[Tensor, Tensor]:
        assert self.weight_quantizer is not None
        codes, row_scale = self.weight_quantizer.encode(self.weight_rows())
        return self.weight_quantizer.levels.decode_int8(codes), row_scale

    def train(self, mode: bool = True) -> Self:
        """Training needs no integer copy of the weight: drop it."""
        if mode:
            self._cached = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cached = None
        return super()._apply(fn, recurse)


class QuantizedLinear(QuantizedLayer):
    """`nn.Linear` whose weight and input are fake-quantized; see `QuantizedLayer` for the arguments."""

    def __init__(
        self,
        layer: nn.Linear,
        weight_quantizer: Quantizer | None,
        activation_quantizer: ActivationQuantizer | None,
        owned: bool = True,
        weights_rotated: bool = False,
    ) -> None:
        super().__init__(layer, weight_quantizer, activation_quantizer, owned, weights_rotated)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def rows_of(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def rotated_weight(self, back: bool = False) -> Tensor:
        """See `QuantizedLayer.rotated_weight`."""
        quantizer = self.rotating_quantizer
        return self.weight if quantizer is None else rotated(self.weight.detach(), quantizer, back)

    def unquantized(self) -> nn.Linear:
        """See `QuantizedLayer.unquantized`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def _dequantized(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        weight, activation = self._quantized_rows(), self.activation_quantizer
        if activation is not None:
            x = activation(x, self)
        elif self.weight_quantizer is not None:
            x = self.weight_quantizer.rotate(x)
        return F.linear(x, weight, self.bias)

    def _integer(self, x: Tensor) -> Tensor:
        assert self.activation_quantizer is not None
        weight, weight_scale = self._integer_weight()
        levels, row_scale = self.activation_quantizer.integers(x, self)
        act_scale = integer_scale(self.activation_quantizer.quantizer).reshape(())
        product = scaled_product(levels, weight, weight_scale, act_scale, row_scale)
        return epilogue(product, self.bias, x).reshape(*x.shape[:-1], self.out_features)


def rotated(vectors: Tensor, quantizer: Quantizer, back: bool = False) -> Tensor:
    """`[..., features]` in the domain that the input of `quantizer` is rotated into, or the way back, up to rounding.

    The rotation is its own inverse, and signs come before it.
    """
    if not back:
        return quantizer.rotate(vectors)
    vectors = hadamard(vectors, quantizer.block)
    return vectors if quantizer.signs is None else vectors * quantizer.signs


def _require_no_rotation(weight: Quantizer | None, activation: ActivationQuantizer | None) -> None:
    if weight is None or activation is None:
        raise BellboxError(
            "weights_rotated needs both weight and input quantized: only a quantizer rotates inputs"
        )
    if weight.block != 1 or weight.signs is not None:
        raise BellboxError(
            "weights_rotated says that the weight is rotated: its quantizer must have block=1, no signs"
        )


def _require_same_rotation(weight: Quantizer, activation: Quantizer) -> None:
    if weight.block != activation.block:
        raise BellboxError(
            f"weight and activation must be rotated alike, not by blocks {weight.block, activation.block}"
        )
    if (weight.signs is None) != (activation.signs is None):
        raise BellboxError(
            "weight and activation must both have random signs before the rotation, or neither"
        )


def integer_scale(quantizer: Quantizer) -> Tensor:
    """What one *integer* is worth, fp32: the scale of a level, halved (exactly) where integers are doubled."""
    return quantizer.scale() / quantizer.levels.multiplier


def epilogue(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`[..., out]` with the bias added in fp32, in the dtype that the caller of a layer with input `x` expects."""
    if bias is not None:
        product = product + bias.to(torch.float32)
    return product.to(result_dtype(x))
