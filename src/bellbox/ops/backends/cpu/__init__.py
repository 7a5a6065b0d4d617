"""The compiled kernels for CPUs (native/) as a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bellbox.ops import native
from bellbox.ops.backends.cpu import implementations
from bellbox.ops.dispatch import Backend, register


class CpuBackend(Backend):
    """fp32 and bf16 on the CPU, up to 16 levels."""

    name = "cpu"
    priority = 10

    def why_not(self, operation: str, arguments: Mapping[str, Any]) -> str | None:
        """None where the compiled kernels take the call, else the reason."""
        known = implementations.TABLE.get(operation)
        if known is None:
            return "has no kernel for it"
        if not native.available():
            return "the compiled kernels are not there"
        elsewhere = [each for each in arguments.values() if isinstance(each, Tensor) and not each.is_cpu]
        if elsewhere:
            return f"a tensor is on {elsewhere[0].device}"
        return known.why_not(arguments)

    def has(self, operation: str) -> bool:
        """Whether the compiled module has a kernel for the operation."""
        return operation in implementations.TABLE and native.available()

    def implementation(self, operation: str) -> Callable[..., Any]:
        """The kernel that runs a call which was taken."""
        return implementations.TABLE[operation].run

    def bind(
        self, operation: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]
    ) -> Callable[..., Any] | None:
        """A call with the addresses of its buffers, or None where it has none."""
        bind = implementations.BOUND.get(operation)
        if bind is None or not native.available():
            return None
        if any(each is not None and not each.is_cpu for each in tensors.values()):
            return None
        with torch.no_grad():
            return bind(tensors, numbers)

    def status(self) -> str:
        """See `Backend.status`."""
        return native.describe()

    def multiplies_integers(self, device: str) -> bool:
        """See `Backend.multiplies_integers`."""
        return device == "cpu" and native.available()


register(CpuBackend())
