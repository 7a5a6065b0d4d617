"""Process-wide switches that hold while a run goes on, and are put back afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from bellbox.quantizers.base import debug_enabled, set_debug


@contextmanager
def debug_mode(enabled: bool) -> Iterator[None]:
    """Quantizers refuse non-finite inputs while a debugged run is on."""
    before = debug_enabled()
    set_debug(enabled or before)
    try:
        yield
    finally:
        set_debug(before)


@contextmanager
def determinism(device: torch.device) -> Iterator[None]:
    """On a GPU, ask for kernels that add in a fixed order; on a CPU a fixed number of threads is enough."""
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # The module replaces itself by an object with properties, which a type checker cannot see.
    deterministic: Any = sys.modules["torch.utils.deterministic"]
    # Debugging aid of PyTorch that costs a pass over every new tensor and changes no result.
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        deterministic.fill_uninitialized_memory = fill
