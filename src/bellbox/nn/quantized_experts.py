"""Fused experts for training: each expert's matrix is quantized as the linear layer that it is.

The 3-D parameters stay what their owner knows, the same objects under the same names: optimizers, checkpoints and
ties go on. An expert's layer reads its matrix out of them in each forward, and rotates it there; it has a scale for
each row, and a quantizer of its own for the tokens that are routed to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bellbox.nn.adopted import class_for, twin
from bellbox.nn.experts import ExpertsForward, bias, matrix, one_of
from bellbox.nn.quantized import ActivationQuantizer, QuantizedLayer
from bellbox.nn.quantized_linear import QuantizedMatrix
from bellbox.quantizers.base import Quantizer

LAYERS = "expert_layers"
"""Name under which quantized experts hold their layers."""


class QuantizedExpert(QuantizedMatrix):
    """One matrix of one expert, `[out, in]`, which lies in a parameter of the experts' module.

    Args:
        experts: the module with the 3-D parameters.
        stack: name of the parameter.
        index: of the expert.
        weight_quantizer: as of `QuantizedLayer`.
        activation_quantizer: as of `QuantizedLayer`.

    Raises:
        BellboxError: two rotations that do not cancel.
    """

    plain_kind = nn.Linear
    experts: nn.Module
    """The module around this one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """No layer becomes this one: there was none."""
        return object.__new__(cls)

    def __init__(
        self,
        experts: nn.Module,
        stack: str,
        index: int,
        weight_quantizer: Quantizer | None,
        activation_quantizer: ActivationQuantizer | None,
    ) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "experts", experts)  # no child of this one
        self.stack, self.index = stack, index
        super().__init__(self, weight_quantizer, activation_quantizer)
        self.plain_class = nn.Linear

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.stack}[{self.index}], in_features={self.row_length}, out_features={self.row_count}"

    @property
    def stored_weight(self) -> Tensor:
        """The expert's matrix `[out, in]`: a view of the parameter."""
        return matrix(self.experts, self.stack, self.index)

    @property
    def parameter(self) -> Tensor:
        """See `QuantizedLayer.parameter`: the matrices of all experts."""
        return getattr(self.experts, self.stack)

    def part_of(self, whole: Tensor) -> Tensor:
        """See `QuantizedLayer.part_of`: `[out, in]`."""
        return one_of(self.experts, whole, self.index)

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The expert's bias `[out]`: a view."""
        return bias(self.experts, self.stack, self.index)

    def rows_of(self, weight: Tensor) -> Tensor:
        """`[out, in]`, line by line in memory."""
        return weight.contiguous()

    def weight_key(self, prefix: str) -> str:
        """See `QuantizedLayer.weight_key`."""
        return prefix.removesuffix(f"{LAYERS}.{self.stack}.{self.index}.") + self.stack

    def _state(self) -> Iterator[Tensor | None]:
        yield self.parameter[self.index]
        yield from list(super()._state())[1:]


class QuantizedExperts(ExpertsForward):
    """Fused experts, some or all of whose projections are quantized.

    Args:
        experts: the owner's module, to take everything from.
        layers: of each quantized parameter by name, one layer an expert; they read the parameters of `experts`.
    """

    plain_class: type[nn.Module]
    """The owner's class."""

    def __new__(cls, experts: Any = None, *_: Any, **__: Any) -> Any:
        """An object with all that `experts` has, of a class derived from this one and the owner's."""
        return object.__new__(cls) if experts is None else twin(experts, class_for(cls, type(experts)))

    def __init__(self, experts: nn.Module, layers: Mapping[str, list[QuantizedExpert]]) -> None:
        self.plain_class = type(experts)
        inside = nn.ModuleDict({name: nn.ModuleList(each) for name, each in layers.items()})
        self._modules[LAYERS] = inside.train(experts.training)

    @property
    def quantized_stacks(self) -> list[str]:
        """Names of the parameters that are quantized."""
        inside: Any = self._modules[LAYERS]
        return list(inside)

    def layers_of(self, stack: str) -> nn.ModuleList | None:
        """See `ExpertsForward`."""
        inside: Any = self._modules[LAYERS]
        return inside._modules.get(stack)

    def unquantized(self) -> nn.Module:
        """The owner's module again, with this one's parameters."""
        plain = twin(self, self.plain_class)
        plain._modules.pop(LAYERS)
        plain.__dict__.pop("plain_class")
        return plain


def quantized_inside(made: QuantizedLayer | QuantizedExperts) -> list[QuantizedLayer]:
    """The layer itself, or the layers of all experts."""
    return [module for module in made.modules() if isinstance(module, QuantizedLayer)]
