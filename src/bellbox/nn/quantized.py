"""Base of fake-quantized linear layers and convolutions: quantizers, codes of the weight, two ways forward.

In training the forward is that of fake-quantized floats. In evaluation it is the operation of the packed layer, on
the same arguments that `convert` would store: that is what makes the prepared and the packed model one function.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels
from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError
from bellbox.nn.adopted import class_for, plain_class_of, twin
from bellbox.nn.input_cache import InputCache
from bellbox.nn.integer_product import CodedWeight
from bellbox.nn.lazy_weight import LazyWeight, WeightSource
from bellbox.nn.record import Record
from bellbox.ops import native
from bellbox.ops.dispatch import is_unwatched
from bellbox.ops.encode import SIGMA_CEILING, SIGMA_FLOOR
from bellbox.ops.weight_layout import prepack
from bellbox.quantizers.base import Quantizer
from bellbox.quantizers.coded import Coded

ROTATED = "rotated_weight"
"""Name of a weight that is stored rotated: no reader of a state dict takes it for the plain one."""
OF_LAYER = (
    "plain_class", "weights_rotated", "integer_forward", "held_weight", "has_run", "weight_was_read",
    "read_in_forward", "_call", "_keeps_call",
)  # fmt: skip
"""Attributes that a plain layer does not have."""
EXTRA_STATE = "_extra_state"
"""Name under which torch keeps what `get_extra_state` gives."""


class ActivationQuantizer(nn.Module):
    """An activation quantizer, what its readers share, and its observers."""

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
        return self.quantizer.learned_scale

    def forward(self, x: Tensor, reader: object = None) -> Tensor:
        """Fake-quantize `[..., features]` for a layer, differentiable."""
        return self.shared.get_or_compute(
            reader, x, ("fake", self.training, *self._width()), self._state(), self._fake
        )

    def coded(self, x: Tensor, reader: object = None) -> Coded:
        """The same as codes, for a product on integers."""
        return self.shared.get_or_compute(
            reader, x, ("coded", self.training, *self._width()), self._state(), self._coded
        )

    def observe(self, x: Tensor, reader: object = None) -> None:
        """Show the codes of an input to the observers, once for all readers."""
        if self.observers:
            self.shared.get_or_compute(reader, x, ("codes", *self._width()), self._state(), self._observe)

    def _width(self) -> tuple[int, ...]:
        return (self.levels.n,) if self.quantizer.widths else ()

    def _state(self) -> list[Tensor | None]:
        return [*self.quantizer._parameters.values(), *self.quantizer._buffers.values()]

    def _fake(self, x: Tensor) -> Tensor:
        if self.observers:
            self._observe(x)
        return self.quantizer(x)

    def _coded(self, x: Tensor) -> Coded:
        if self.observers:
            self._observe(x)
        return self.quantizer.coded(x)

    def _observe(self, x: Tensor) -> None:
        codes = self.quantizer.codes(x)
        for observer in self.observers:
            observer(codes)


class _RotatedWeight(WeightSource):
    """The plain weight of a layer that stores it rotated."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer

    def decode(self) -> Tensor:
        """See `WeightSource`."""
        return self.layer.turned(self.stored, back=True)

    def was_used(self) -> None:
        """See `WeightSource`."""
        self.layer.note_reading()

    def write(self, weight: Tensor) -> None:
        """See `WeightSource`."""
        with torch.no_grad():
            self.stored.copy_(self.layer.turned(weight.detach().to(self.stored)))

    @property
    def stored(self) -> Tensor:
        """See `WeightSource`."""
        return self.layer.stored_weight

    def gradient(self) -> Tensor | None:
        """See `WeightSource`."""
        grad = self.stored.grad
        return None if grad is None else self.layer.turned(grad, back=True)

    def set_gradient(self, gradient: Tensor | None) -> None:
        """See `WeightSource`."""
        self.stored.grad = None if gradient is None else self.layer.turned(gradient)


class QuantizedLayer(nn.Module, ABC):
    """A fake-quantized layer: an owner's layer with quantizers, of another class.

    Args:
        layer: to take everything from, weight and bias, hooks and attributes; shared with it, not copied.
        weight_quantizer: quantizer of the weight's rows, or None to leave it.
        activation_quantizer: of the input, or None to leave it. One that another layer owns is passed with
            `owned=False`, and then appears in the state dict under its owner only.
        owned: whether this layer registers the activation quantizer.
        weights_rotated: whether the weight is to be stored in the domain that the input is rotated into; its own
            quantizer then does not rotate. It is turned by `rotate_stored_weight`.

    Raises:
        BellboxError: two rotations that do not cancel.
    """

    plain_kind: ClassVar[type[nn.Module]]
    """Torch's own class."""
    activation_quantizer: ActivationQuantizer | None
    weight_quantizer: Quantizer | None
    bias: Tensor | None
    weights_rotated: bool
    plain_class: type[nn.Module]
    """The owner's class."""
    integer_forward: bool | None = None
    """Whether training multiplies integers too (`Recipe.integer_forward`); only layers that multiply matrices do."""
    held_weight: Tensor | CodedWeight | None
    """The fake-quantized or coded rows, while `nn.weights_quantized_once` holds them for several forwards."""
    has_run: bool
    """Whether its forward was called since it was prepared, as far as no compiler hid that."""
    weight_was_read: bool
    """Whether somebody computed with `weight`, or took it where it is not stored rotated."""
    read_in_forward: bool
    """Whether that was in the forward of some module, so that what the model gives depends on it."""
    _call: tuple[Any, dict[str, Tensor | None], Callable[..., Tensor]] | None
    """The packed layer's call of the last evaluation: what it was made from, its buffers, itself."""
    _keeps_call: bool
    """Whether nobody writes, see `weights_coded_once`."""

    def __new__(cls, layer: Any = None, *rest: Any, **named: Any) -> Any:
        """An object with all that `layer` has, of this class or, for a subclass of torch's, one derived from both.

        Arguments of torch's own class make one of that: adapters are made by `type(layer)(8, 4)`.
        """
        if layer is None and not named:
            return super().__new__(cls)
        if not isinstance(layer, nn.Module):
            return plain_class_of(cls)(*(() if layer is None else (layer,)), *rest, **named)
        return twin(layer, class_for(cls, type(layer)))

    def __init__(
        self,
        layer: nn.Module,
        weight_quantizer: Quantizer | None,
        activation_quantizer: ActivationQuantizer | None,
        owned: bool = True,
        weights_rotated: bool = False,
    ) -> None:
        self.plain_class = type(layer)
        self.weights_rotated = weights_rotated
        self._modules["weight_quantizer"] = weight_quantizer
        if owned:
            self._modules["activation_quantizer"] = activation_quantizer
        else:
            # Past nn.Module's own bookkeeping: a borrowed quantizer must not be registered twice.
            object.__setattr__(self, "activation_quantizer", activation_quantizer)
        self._start()
        self.has_run = self.weight_was_read = self.read_in_forward = False
        _require_same_widths(weight_quantizer, activation_quantizer)
        if weights_rotated:
            _require_no_rotation(weight_quantizer, activation_quantizer)
        elif weight_quantizer is not None and activation_quantizer is not None:
            _require_same_rotation(weight_quantizer, activation_quantizer.quantizer)

    def _start(self) -> None:
        """Nothing is remembered of earlier forwards."""
        self.held_weight = None
        self._call = None
        self._keeps_call = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies remember nothing of forwards."""
        return {**self.__dict__, "held_weight": None, "_call": None, "_keeps_call": False}

    # --- the weight ---

    @property
    def stored_weight(self) -> Tensor:
        """The parameter: the weight, or the rotated weight where that is stored."""
        parameters = self._parameters
        found = parameters.get(ROTATED)
        found = parameters.get("weight") if found is None else found
        if found is None:
            raise AttributeError("weight")
        return found

    @property
    def parameter(self) -> Tensor:
        """The parameter that the weight lies in, which is what optimizers and checkpoints have: mostly the weight."""
        return self.stored_weight

    def part_of(self, whole: Tensor) -> Tensor:
        """Of a tensor that belongs to `parameter` number by number, what belongs to `stored_weight`, in its shape."""
        return whole

    def weight_key(self, prefix: str) -> str:
        """Name of the plain weight in a state dict where the names of this layer's tensors begin with `prefix`."""
        return f"{prefix}weight"

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The plain weight, whoever asks: where it is stored rotated, a `LazyWeight` that reads and writes through."""
        stored = self.stored_weight
        if ROTATED not in self._parameters:
            if not self.read_in_forward and is_unwatched(stored):
                self.note_reading()
            return stored
        if not is_unwatched(stored):
            return self.turned(stored, back=True)
        return LazyWeight.of(_RotatedWeight(self), stored.shape, stored.dtype)

    def note_reading(self) -> None:
        """Remember that somebody reads the weight for itself."""
        self.weight_was_read = True
        self.read_in_forward = self.read_in_forward or _within_a_forward()

    @weight.setter
    def weight(self, value: Any) -> None:
        self._set_weight(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would register a parameter before it looked for a property
            self._set_weight(value)
        else:
            super().__setattr__(name, value)

    def _set_weight(self, value: Any) -> None:
        if ROTATED not in self._parameters:
            super().__setattr__("weight", value)
        elif isinstance(value, LazyWeight) and value._source.stored is self.stored_weight:
            return
        elif isinstance(value, LazyWeight) and value._is_param and isinstance(value._source, _RotatedWeight):
            self._parameters[ROTATED] = self._tied_to(value._source.layer)
        elif not isinstance(value, Tensor):
            raise BellboxError("the weight of a low-bit layer can only be set to a tensor")
        else:
            plain = value.decoded() if isinstance(value, LazyWeight) else value.detach()
            with torch.no_grad():
                turned = self.turned(plain)
            self._parameters[ROTATED] = nn.Parameter(turned, getattr(value, "requires_grad", True))

    def _tied_to(self, other: QuantizedLayer) -> nn.Parameter:
        """The parameter of another layer, to be this one's too.

        Raises:
            BellboxError: it is stored in another domain than this layer's input is rotated into.
        """
        mine, its = self.rotating_quantizer, other.rotating_quantizer
        assert mine is not None
        assert its is not None
        signs = mine.signs, its.signs
        alike = all(each is None for each in signs) or (
            signs[0] is not None and signs[1] is not None and torch.equal(signs[0], signs[1])
        )
        if mine.block != its.block or not alike or other.stored_weight.shape != self.stored_weight.shape:
            raise BellboxError(
                f"{mine.name.removesuffix('.input')} cannot be tied to {its.name.removesuffix('.input')} now: one of "
                "them stores its weight in another shape or rotation; tie them before prepare"
            )
        return cast(nn.Parameter, other.stored_weight)

    def rotate_stored_weight(self) -> None:
        """Turn the stored weight into the domain of the input, under the name `rotated_weight`; once."""
        if self.weights_rotated and ROTATED not in self._parameters:
            weight = self._parameters["weight"]
            assert weight is not None
            with torch.no_grad():
                weight.copy_(self.turned(weight))
            renamed = {ROTATED if name == "weight" else name: p for name, p in self._parameters.items()}
            self._parameters.clear()
            self._parameters.update(renamed)

    def rotate_stored_weight_back(self) -> None:
        """The way back from `rotate_stored_weight`; the parameter stays the same object."""
        if ROTATED in self._parameters:
            weight = self._parameters[ROTATED]
            assert weight is not None
            with torch.no_grad():
                weight.copy_(self.turned(weight, back=True))
            renamed = {"weight" if name == ROTATED else name: p for name, p in self._parameters.items()}
            self._parameters.clear()
            self._parameters.update(renamed)

    @property
    def runs_on_integers(self) -> bool:
        """Whether evaluation multiplies integers: both sides quantized to levels that fit int8."""
        activation = self.activation_quantizer
        pair = self.weight_quantizer, activation and activation.quantizer
        return all(q is not None and q.on_grid and q.levels.fits_int8 for q in pair)

    def trains_on_integers(self, device: str, dtype: torch.dtype) -> bool:  # noqa: ARG002 (as where it is overridden)
        """Whether a training forward in this dtype on this kind of device multiplies integers too."""
        return False

    def coded_weight(self) -> CodedWeight:
        """The weight as such a forward takes it, differentiable; both sides must be quantized."""
        assert self.weight_quantizer is not None
        return CodedWeight.of(self.weight_rows(), self.weight_quantizer)

    @property
    def row_count(self) -> int:
        """Outputs: rows of `weight_rows`."""
        return self.stored_weight.shape[0]

    @property
    def row_length(self) -> int:
        """Weights of one output: columns of `weight_rows`."""
        return math.prod(self.stored_weight.shape[1:])  # of a sharded one, nothing is fetched

    @property
    def places(self) -> int:
        """Places of a filter's window; 1 of a linear layer."""
        return 1

    @abstractmethod
    def rows_of(self, weight: Tensor) -> Tensor:
        """A weight of this layer's shape as the matrix `[row_count, row_length]` that is quantized; differentiable."""

    @abstractmethod
    def turned(self, weight: Tensor, back: bool = False) -> Tensor:
        """A weight, in its own shape, in the domain that the input is rotated into; or the way back. Differentiable."""

    @abstractmethod
    def _dequantized(self, x: Tensor) -> Tensor:
        """The forward of training: fake-quantized floats."""

    @abstractmethod
    def _integer(self, x: Tensor) -> Tensor:
        """The forward of evaluation: the operation of the packed layer."""

    def vectors_of(self, x: Tensor) -> Tensor:
        """The input as the activation quantizer takes it."""
        return x

    def weight_rows(self) -> Tensor:
        """`rows_of` what is stored."""
        return self.rows_of(self.stored_weight)

    @property
    def rotating_quantizer(self) -> Quantizer | None:
        """The one whose rotation the layer works in: the input's, or the weight's where that alone is quantized."""
        inputs = self.activation_quantizer
        return self.weight_quantizer if inputs is None else inputs.quantizer

    def unquantized(self) -> nn.Module:
        """The owner's layer again, with this one's weight and bias, the same objects; a weight stays rotated or not."""
        plain = twin(self, self.plain_class)
        for name in ("weight_quantizer", "activation_quantizer"):
            plain._modules.pop(name, None)
            plain.__dict__.pop(name, None)
        for name in OF_LAYER:
            plain.__dict__.pop(name, None)
        return plain

    def get_extra_state(self) -> Tensor:
        """What the state belongs to (`nn.record`): uint8 `[128]`."""
        return record_of(self).pack()

    def set_extra_state(self, state: Any) -> None:
        """Nothing: the record was compared before anything was copied (`nn.state`)."""

    # --- codes ---

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

    @torch.no_grad()
    def packed_buffers(self, weight: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor | None]:
        """What the packed layer stores, made from what is there now (`ops.packed_linear`).

        Args:
            weight: `encoded_weight`, where it is at hand.

        Returns:
            `packed` uint8, `weight_scale` fp32 `[rows]`, `bias` fp32 `[rows]` or None, `act_scale` fp32 `[1]`,
            `act_thresholds` fp32 `[n - 1]`, `act_rstd` fp32 `[1]` or None, `act_signs` int8 or None.
        """
        inputs, quantizer = self.activation_quantizer, self.weight_quantizer
        assert inputs is not None
        assert quantizer is not None
        codes, row_scales = quantizer.encode(self.weight_rows()) if weight is None else weight
        activation, bias = inputs.quantizer, self.bias
        return {
            "packed": prepack(codes, quantizer.levels.n, self.places),
            "weight_scale": (quantizer.scale() * row_scales).reshape(-1).to(torch.float32),
            "bias": None if bias is None else bias.detach().to(torch.float32),
            "act_scale": activation.scale().detach().reshape(1).to(torch.float32),
            "act_thresholds": activation.thresholds(self.stored_weight.device),
            "act_rstd": activation.rstd().detach().reshape(1) if activation.normalise == "static" else None,
            "act_signs": activation.signs,
        }

    def packed_numbers(self) -> tuple[Any, ...]:
        """The numbers of the packed layer's operation, from `in_features` to `rescale`."""
        inputs, quantizer = self.activation_quantizer, self.weight_quantizer
        assert inputs is not None
        assert quantizer is not None
        activation, levels = inputs.quantizer, quantizer.levels
        normalise = "static" if activation.normalise == "tensor" else activation.normalise
        return (
            self.row_length, levels.n, levels.zero_point, activation.levels.zero_point, activation.block, normalise,
            activation.rescale and activation.normalise != "tensor",
        )  # fmt: skip

    # --- forward ---

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The layer's output, in training from fake-quantized floats, in evaluation from integers."""
        if self.training or not self.runs_on_integers:
            if is_unwatched(x):
                self.has_run = True
            return self._dequantized(x)
        exact = self._integer(x)
        if not torch.is_grad_enabled():
            return exact
        # Values of the integer path, gradient of the other: lin - lin is exactly zero.
        smooth = self._dequantized(x)
        return exact.detach() + (smooth - smooth.detach())

    def _quantized_rows(self) -> Tensor:
        """The fake-quantized rows of the weight; rotated only, where the input alone is quantized."""
        if isinstance(self.held_weight, Tensor):
            return self.held_weight
        if self.weight_quantizer is not None:
            return self.weight_quantizer(self.weight_rows())
        # the rotations must cancel: what is not quantized is rotated all the same
        assert self.activation_quantizer is not None
        rows = self.weight_rows()
        quantizer = self.activation_quantizer.quantizer
        return quantizer.rotate(rows.reshape(len(rows), -1, quantizer.features)).reshape(rows.shape)

    @abstractmethod
    def _bind(self, buffers: dict[str, Tensor | None]) -> Callable[..., Tensor]:
        """The packed layer's call on these buffers."""

    @torch.no_grad()
    def packed_call(self, x: Tensor) -> Callable[..., Tensor]:
        """The packed layer's call on the weight and scales as they are now.

        The codes are kept from forward to forward where that can be done right: while `weights_coded_once` says that
        nobody writes, or with a fingerprint of every tensor that they depend on. Else they are made anew.
        """
        inputs = self.activation_quantizer
        assert inputs is not None
        if not is_unwatched(x) or not inputs.quantizer.is_set:  # the first batch sets its scale
            inputs.quantizer.see_first(inputs.quantizer.rows_of(self.vectors_of(x)))
        if not is_unwatched(x):
            return self._bind(self._buffers_for(x, self.packed_buffers()))
        kept = self._call
        key = kept[0] if kept is not None and self._keeps_call else native.fingerprint(self._state())
        if kept is None or key is None or kept[0] != key:
            self.has_run = True
            buffers = self.packed_buffers()
            kept = (key, buffers, self._bind(buffers))
            self._call = kept if key is not None or self._keeps_call else None
        if inputs.quantizer.normalise == "tensor":
            return self._bind(self._buffers_for(x, kept[1]))
        return kept[2]

    def _buffers_for(self, x: Tensor, buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """With 1/sigma of this very input, where the whole tensor has one (training's `tensor` granularity)."""
        inputs = self.activation_quantizer
        assert inputs is not None
        quantizer = inputs.quantizer
        if quantizer.normalise != "tensor":
            return buffers
        sigma = quantizer.measure(quantizer.rows_of(self.vectors_of(x)))
        inverse = torch.where(sigma <= SIGMA_CEILING, 1 / sigma.clamp(min=SIGMA_FLOOR), float("nan"))
        scale = buffers["act_scale"]
        if quantizer.rescale:  # the output follows sigma: one number for the whole tensor
            assert scale is not None
            scale = scale * sigma.clamp(min=SIGMA_FLOOR).to(torch.float32).reshape(1)
        return {**buffers, "act_rstd": inverse.reshape(1), "act_scale": scale}

    def _state(self) -> Iterator[Tensor | None]:
        """Every tensor that the packed call depends on."""
        yield self.stored_weight
        yield self.bias
        inputs = self.activation_quantizer
        for quantizer in (self.weight_quantizer, inputs and inputs.quantizer):
            if quantizer is not None:
                yield from quantizer.parameters()
                yield from quantizer.buffers()

    def forget_codes(self) -> None:
        """Let go of what is kept of a weight from forward to forward: its quantizer has other levels now."""
        self._call = None

    def train(self, mode: bool = True) -> Self:
        """Training needs no codes of the weight: drop them."""
        if mode:
            self._call = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._call = None
        return super()._apply(fn, recurse)


def _within_a_forward() -> bool:
    """Whether a module of torch is being called now."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALLING:
            return True
        frame = frame.f_back
    return False


_CALLING = nn.Module._call_impl.__code__


def record_of(layer: QuantizedLayer) -> Record:
    """What the state of a layer says of itself."""
    inputs = layer.activation_quantizer
    activation = None if inputs is None else inputs.quantizer
    return Record.of(layer.weight_quantizer, activation, ROTATED in layer._parameters)


@contextmanager
def weights_coded_once(model: nn.Module) -> Iterator[None]:
    """Evaluate with the codes of the weights kept from forward to forward; nobody may write to the model within."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
    for layer in layers:
        layer._call, layer._keeps_call = None, True
    try:
        yield
    finally:
        for layer in layers:
            layer._call, layer._keeps_call = None, False


def turned_vectors(vectors: Tensor, quantizer: Quantizer, back: bool = False) -> Tensor:
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


def _require_same_widths(weight: Quantizer | None, activation: ActivationQuantizer | None) -> None:
    """Inputs of one width go with any weight; of several, with a weight that has the same ones."""
    widths = () if activation is None else activation.quantizer.widths
    if widths and (weight is None or weight.widths != widths):
        raise BellboxError("nested inputs need a weight that is nested at the same widths")


def _require_same_rotation(weight: Quantizer, activation: Quantizer) -> None:
    if weight.block != activation.block:
        raise BellboxError(
            f"weight and activation must be rotated alike, not by blocks {weight.block, activation.block}"
        )
    if (weight.signs is None) != (activation.signs is None):
        raise BellboxError(
            "weight and activation must both have random signs before the rotation, or neither"
        )
