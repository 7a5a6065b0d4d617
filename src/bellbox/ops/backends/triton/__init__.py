"""Kernels for NVIDIA GPUs in Triton as a backend; nothing of Triton is imported before the first call is taken."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bellbox.core.packing import code_width
from bellbox.ops.backends.triton import availability, limits
from bellbox.ops.dispatch import Backend, register
from bellbox.ops.packed_linear import TENSORS

LINEAR = (
    "x", *TENSORS, "in_features", "weight_levels", "weight_zero_point", "act_zero_point", "block", "normalise",
    "rescale", "dtype",
)  # fmt: skip
"""Arguments of `packed_linear` in the order of its schema."""


class TritonBackend(Backend):
    """fp32, bf16 and fp16 on CUDA, up to 16 levels; on CPU tensors where Triton interprets (TRITON_INTERPRET=1)."""

    name = "triton"
    priority = 5

    def why_not(self, operation: str, arguments: Mapping[str, Any]) -> str | None:
        """See `Backend.why_not`."""
        known = limits.WHY_NOT.get(operation)
        if known is None:
            return "has no kernel for it"
        devices = {each.device for each in arguments.values() if isinstance(each, Tensor)}
        if len(devices) > 1:
            return f"tensors are on {' and '.join(sorted(map(str, devices)))}"
        return availability.why_not_on(devices.pop()) or known(arguments)

    def has(self, operation: str) -> bool:
        """See `Backend.has`."""
        return operation in limits.WHY_NOT

    def implementation(self, operation: str) -> Callable[..., Any]:
        """See `Backend.implementation`."""
        return importlib.import_module(f"{__name__}.launch").TABLE[operation]

    def may_take(self, operation: str, tensors: Mapping[str, Tensor | None]) -> bool:
        """See `Backend.may_take`."""
        del operation
        devices = {each.device.type for each in tensors.values() if each is not None}
        return devices == {"cuda"} or (devices == {"cpu"} and availability.interpreted())

    def bind(
        self, operation: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]
    ) -> Callable[..., Any] | None:
        """See `Backend.bind`: of layers that share an input, which is then coded once."""
        if operation != "packed_linear_group" or not self.may_take(operation, tensors):
            return None
        layers: list[tuple[Mapping[str, Tensor | None], tuple[Any, ...]]] = numbers["layers"]
        if (
            len({code_width(each[1]) for _, each in layers}) > 1
        ):  # codes of the input stand as its weights' do
            return None

        def call(x: Tensor, dtype: torch.dtype) -> list[Tensor] | None:
            now = [
                ((buffers["packed"], *(buffers[name] for name in TENSORS[1:])), each)
                for buffers, each in layers
            ]
            for own, each in now:
                named: dict[str, Any] = dict(zip(LINEAR, (x, *own, *each, dtype), strict=True))
                if x.shape[-1:] != (each[0],) or self.why_not("packed_linear", named) is not None:
                    return None
            return self.implementation(operation)(x, now, dtype)

        return call

    def status(self) -> str:
        """See `Backend.status`."""
        return availability.describe()

    def multiplies_integers(self, device: str) -> bool:
        """See `Backend.multiplies_integers`."""
        return (
            device == "cuda"
            and torch.cuda.is_available()
            and availability.why_not_on(torch.device("cuda", torch.cuda.current_device())) is None
        )


register(TritonBackend())
