"""Units of the processor: bf16 and 8-bit integer products are many times slower where it has none for them.

Without AVX512-BF16 or AMX a bf16 product is emulated (a training step on Zen 3: 9.5 times that in fp32); without VNNI
or AMX so is `torch._int_mm` (22 to 28 times the float product). A processor that is held down, by `BELLBOX_ISA` (avx2,
portable) or oneDNN's `ONEDNN_MAX_CPU_ISA`, counts as not having them: it then behaves as the smaller one does.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, Literal

import torch

Precision = Literal["bf16", "fp32"]
MAX_THREADS = 1024
"""More are refused: the system would run out of them somewhere in the middle of the work."""

_HELD = {"avx2", "portable"}
# What oneDNN still uses under a limit; under any other value, or none, it uses all there is.
_ONEDNN: dict[str, frozenset[str]] = {
    **dict.fromkeys(("SSE41", "AVX", "AVX2", "AVX512_CORE"), frozenset()),
    "AVX2_VNNI": frozenset({"avx_vnni"}),
    "AVX2_VNNI_2": frozenset({"avx_vnni"}),
    "AVX512_CORE_VNNI": frozenset({"avx_vnni", "avx512_vnni"}),
    "AVX512_CORE_BF16": frozenset({"avx_vnni", "avx512_vnni", "avx512_bf16"}),
}
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_INT8 = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fast_bf16() -> bool:
    """Whether bf16 products are at least as fast as fp32 ones here."""
    return bool(_BF16 & _usable())


def fast_int8() -> bool:
    """Whether products of 8-bit integers are at least as fast as fp32 ones here."""
    return bool(_INT8 & _usable())


def choose_precision(device: torch.device) -> tuple[Precision, str]:
    """The faster precision to train in on a device, and why, in words."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 units"
        return "fp32", "this GPU has no bf16 units"
    if fast_bf16():
        return "bf16", "this processor has bf16 units"
    if _BF16 & _features():
        return "fp32", "this processor's bf16 units are held back by the environment"
    return "fp32", "this processor has no bf16 units"


def _usable() -> frozenset[str]:
    if os.environ.get("BELLBOX_ISA") in _HELD:
        return frozenset()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return _features() & _ONEDNN.get(limit.upper(), _features())


def beyond_avx2() -> bool:
    """Whether there is anything that a processor with AVX2 alone lacks."""
    return bool(_features()) or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.cache
def _features() -> frozenset[str]:
    """Those of `_BF16` and `_INT8` that the processor has."""
    ask: Any = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        there = ask()
        return frozenset(name for name in _BF16 | _INT8 if there.get(name))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flags) & (_BF16 | _INT8)
