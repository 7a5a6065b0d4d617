"""Layers for inference with a weight of codes: the weight to look at, and what they take over from the owner's."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from bellbox.core.grid import Grid
from bellbox.errors import BellboxError
from bellbox.nn.adapters import refuse_as_modules_to_save
from bellbox.nn.adopted import become, class_for, owners_class, plain_class_of
from bellbox.nn.lazy_weight import LazyWeight, WeightSource
from bellbox.nn.quantized import OF_LAYER, QuantizedLayer

_OURS = frozenset(
    {
        *OF_LAYER, "_bellbox_looks", "activation_quantizer", "geometry", "weight_quantizer",  # of a trained layer
        "widths", "nested_inputs", "_in_parts",  # of a packed one
    }
)  # fmt: skip
"""Attributes that are not the owner's."""


class _DecodedWeight(WeightSource):
    """The float weight that a layer's codes stand for, rotated back."""

    def __init__(self, layer: CodedLayer) -> None:
        self._layer = layer

    def decode(self) -> Tensor:
        """See `WeightSource`."""
        return self._layer.decoded_weight()

    def write(self, weight: Tensor) -> None:
        """See `WeightSource`."""
        del weight
        raise BellboxError(
            "the weight of a packed layer cannot be written: it is stored as codes; leave an adapter beside the layer, "
            "or change the trained model (merge into the prepared one) and convert it again"
        )

    @property
    def stored(self) -> Tensor:
        """See `WeightSource`: a tensor with its device and no gradient."""
        return self._layer.stored_codes

    def gradient(self) -> Tensor | None:
        """See `WeightSource`."""
        return None

    def set_gradient(self, gradient: Tensor | None) -> None:
        """See `WeightSource`."""
        if gradient is not None:
            self.write(gradient)


class CodedLayer(nn.Module, ABC):
    """A layer whose weight is stored as codes, with scales."""

    plain_kind: ClassVar[type[nn.Module]]
    """Torch's own class."""
    row_count: int
    """Outputs: rows of the weight."""
    row_length: int
    """Weights of one output."""
    weight_levels: Grid
    """How many levels codes have, and which integers they stand for."""
    quantization_method: str = ""
    """Name of the method that the weight was trained with; empty where nobody knows."""

    def __new__(cls, *given: Any, **named: Any) -> Any:
        """A layer of codes; of the owner's class where the arguments are that one's, as adapters call it."""
        if (given or named) and not any(isinstance(each, Grid) for each in (*given, *named.values())):
            return plain_class_of(cls)(*given, **named)
        refuse_as_modules_to_save(CodedLayer)
        return super().__new__(cls)

    @property
    @abstractmethod
    def stored_codes(self) -> Tensor:
        """The buffer that holds the codes, uint8."""

    @property
    @abstractmethod
    def weight_packed(self) -> Tensor:
        """The codes as files hold them: uint8 `[row_count, row bytes]` (docs/format.md)."""

    @abstractmethod
    def fill_from_rows(self, rows: Tensor) -> None:
        """Take codes as files hold them."""

    @abstractmethod
    def weight_codes(self) -> Tensor:
        """uint8 codes of the weight, `[row_count, row_length]`."""

    @abstractmethod
    def decoded_weight(self) -> Tensor:
        """fp32, in the shape of the plain layer's weight, rotated back."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The float weight that the codes stand for, decoded where somebody looks; it cannot be written."""
        return LazyWeight.of(_DecodedWeight(self), self._weight_shape(), torch.float32)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            _DecodedWeight(self).write(value)
        super().__setattr__(name, value)

    @abstractmethod
    def _weight_shape(self) -> tuple[int, ...]:
        """Of the float weight."""

    def take_over(self, layer: nn.Module, memo: dict[int, Any] | None = None) -> None:
        """Be the owner's layer: its hooks, attributes, further modules and tensors, and its class.

        Args:
            layer: that this one was packed from, or in whose place it is read from a file.
            memo: of the deep copy that this layer is part of; where None, all is the owner's own, not copied.
        """

        def taken(value: Any) -> Any:
            return value if memo is None else copy.deepcopy(value, memo)

        own = set(self.__dict__)
        for name, value in layer.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
                continue
            if name not in _OURS and (name not in own or name.endswith(("hooks", "kwargs", "called"))):
                object.__setattr__(self, name, taken(value))
        for name, module in layer._modules.items():
            if name not in _OURS:
                self._modules[name] = taken(module)
        for kind in () if isinstance(layer, CodedLayer) else ("_parameters", "_buffers"):
            for name, value in getattr(layer, kind).items():
                if name not in ("weight", "rotated_weight", "bias"):
                    getattr(self, kind)[name] = taken(value)
        self.__class__ = class_for(type(self), owners_class(layer))

    def move_into(self, place: nn.Module) -> CodedLayer:
        """Turn a layer of a model into this one, which is not to be used afterwards.

        The layer stays the same object, with its hooks and attributes: whoever holds it runs the codes. Where a hook or
        a parametrization made its weight, that one goes, as the codes are the weight now.

        Returns:
            `place`.
        """
        if "weight" in place._parameters or isinstance(place, QuantizedLayer | CodedLayer):
            self.take_over(place)
        become(place, self)
        return cast(CodedLayer, place)
