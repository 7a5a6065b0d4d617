"""Whether Triton's kernels can run: on which device, with which Triton, and if not, why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from typing import Any

import torch

OLDEST = (8, 0)
"""Compute capability that the kernels are written for: int8 tensor cores that take their operands from registers."""


def interpreted() -> bool:
    """Whether Triton interprets its kernels, which is how CPU tensors come to them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    """Whether Triton is there; it is not imported for that."""
    return "triton" in sys.modules or importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not_on(device: torch.device) -> str | None:
    """None where kernels run on tensors of a device, else the reason in a few words.

    A CUDA device on which they do not run is told of once: the reference gives the same results, slower.
    """
    if device.type == "cpu" and interpreted():
        return None if installed() else "Triton is not installed"
    if device.type != "cuda":
        return f"a tensor is on {device}: Triton's kernels are for CUDA"
    reason = _why_not(device.index)
    if reason is not None:
        _tell(reason)
    return reason


def _why_not(index: int | None) -> str | None:
    reason = lacking(installed(), _capability(index) if installed() else OLDEST, torch.version.hip)
    return trouble() if reason is None else reason


@functools.cache
def trouble() -> str | None:
    """Why Triton, though installed, launches nothing here, or None: the first launch builds a module in C.

    Machines without a C compiler, or without Python's headers, are told by that; so is a Triton that does not import.
    """
    try:
        runtime: Any = importlib.import_module("triton.runtime")
        runtime.driver.active.get_current_device()
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"Triton does not start: {lines[0]}"
    return None


def lacking(triton: bool, capability: tuple[int, int], hip: str | None) -> str | None:
    """What keeps kernels from a GPU, or None.

    Args:
        triton: whether it is installed.
        capability: of the GPU, such as (8, 0).
        hip: version of ROCm that torch was built for, None for CUDA.
    """
    if hip is not None:
        return "the kernels are not tried on ROCm"
    if not triton:
        return "Triton is not installed"
    if capability < OLDEST:
        has, needed = (".".join(map(str, each)) for each in (capability, OLDEST))
        return f"the GPU has compute capability {has}, the kernels need {needed}"
    return None


@functools.cache
def _tell(reason: str) -> None:
    way_out = "; pip install triton brings them" if "installed" in reason else ""
    warnings.warn(
        f"no Bellbox kernels on this GPU: {reason}{way_out}. The torch reference runs: the same results, slower",
        stacklevel=2,
    )


def describe() -> str:
    """One line for people: whether the kernels run here."""
    if interpreted():
        return "interpreted, on the CPU (TRITON_INTERPRET=1)" if installed() else "Triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device" + ("" if installed() else ", and Triton is not installed")
    index = torch.cuda.current_device()
    reason = _why_not(index)
    return reason or f"on {torch.cuda.get_device_name(index)}"
