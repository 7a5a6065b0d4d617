"""Fused experts for inference: packed linear layers in place of the 3-D parameters, one a matrix."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.nn.adopted import class_for, owners_class
from bellbox.nn.coded import CodedLayer
from bellbox.nn.experts import ExpertsForward, bias_name
from bellbox.nn.quantized_experts import LAYERS, QuantizedExperts


class ExpertStack(nn.ModuleList):
    """The layers of codes of all experts, in place of a parameter `[experts, ...]`: answers what that is asked for."""

    def __init__(self, layers: Iterable[CodedLayer], is_transposed: bool) -> None:
        super().__init__(layers)
        self.is_transposed = is_transposed

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        first: Any = self[0]
        one = first.row_count, first.row_length
        return torch.Size((len(self), *(one[::-1] if self.is_transposed else one)))

    @property
    def dtype(self) -> torch.dtype:
        """fp32: that of the scales."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        first: Any = self[0]
        return first.stored_codes.device

    def decoded(self) -> Tensor:
        """The parameter that the codes stand for, fp32, rotated back."""
        matrices = torch.stack([layer.decoded_weight() for layer in self])  # type: ignore[operator]
        return matrices.transpose(1, 2) if self.is_transposed else matrices


class PackedExperts(ExpertsForward):
    """Fused experts, some or all of whose projections are layers of codes under the name of their parameter."""

    @classmethod
    def of(
        cls, experts: nn.Module, layers: Mapping[str, list[CodedLayer]], memo: dict[int, Any] | None = None
    ) -> PackedExperts:
        """Packed experts with all that a module of experts has but the parameters of these stacks.

        Args:
            experts: plain, quantized or packed.
            layers: one an expert, by the name of the stack.
            memo: of a deep copy that takes this module along; without it nothing is copied, and `experts` is to become
                what is made.
        """
        made: Any = object.__new__(class_for(cls, owners_class(experts)))
        if memo is not None:
            memo[id(experts)] = made  # before anything is copied: what is copied may lead back here
        gone = {LAYERS, *layers, *map(bias_name, layers)}
        for name, value in experts.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules"):
                value = {key: each for key, each in value.items() if key not in gone}
            if name != "plain_class":
                made.__dict__[name] = value if memo is None else copy.deepcopy(value, memo)
        for name, stack in layers.items():
            made._modules[name] = ExpertStack(stack, made.is_transposed)
        return made

    @classmethod
    def from_quantized(cls, experts: QuantizedExperts, memo: dict[int, Any]) -> PackedExperts:
        """Pack trained experts.

        Args:
            experts: whose layers are packed already.
            memo: of the deep copy that this is part of, with the packed layers.
        """
        layers: dict[str, list[CodedLayer]] = {}
        for name in experts.quantized_stacks:
            layers[name] = [memo[id(layer)] for layer in experts.layers_of(name) or ()]
        return cls.of(experts, layers, memo)

    @property
    def packed_stacks(self) -> list[str]:
        """Names of the parameters that are layers of codes."""
        return [name for name, module in self._modules.items() if isinstance(module, ExpertStack)]

    def layers_of(self, stack: str) -> nn.ModuleList | None:
        """See `ExpertsForward`."""
        found = self._modules.get(stack)
        return found if isinstance(found, ExpertStack) else None
