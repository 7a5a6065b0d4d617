"""Models without memory: on the meta device, and in no time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built inside lies on the meta device: shapes and dtypes, no numbers."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills weights: it would write nothing, take most of the time, and import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Some of torch.nn.init ask no mode, and draw by these.
        if getattr(func, "__module__", "") == nn.init.__name__ or func in (
            torch.Tensor.normal_,
            torch.Tensor.uniform_,
        ):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def give_memory(module: nn.Module, device: torch.device | str) -> None:
    """Uninitialised memory for the module's own tensors that have none: `to_empty` without importing torch's compiler.

    Modules inside are left alone; tensors that have memory keep it.
    """
    module._apply(
        lambda t: torch.empty(t.shape, dtype=t.dtype, device=device) if t.is_meta else t, recurse=False
    )
