"""Limits of the machine: the floors that every measured time is held against."""

from __future__ import annotations

import mmap
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from bellbox.ops import native

_BYTES = 1 << 29
"""Read to measure the bandwidth: more than any cache holds."""
_PIECE = 1 << 23
"""Read at a time where reading takes turns with other work."""


@dataclass(frozen=True)
class Machine:
    """A machine with a number of threads, measured."""

    cpu: str
    threads: int
    torch: str
    kernels: str
    date: str
    read_bandwidth: float
    """Bytes a second, of memory that no cache holds."""
    integer_rate: float | None
    """Multiply-adds of 8-bit integers a second, operands in registers; None where the kernels were not built."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rate = "" if self.integer_rate is None else f", {2 * self.integer_rate / 1e9:,.0f} GOPS of integers"
        return (
            f"{self.cpu}, {self.threads} thread{'s' if self.threads > 1 else ''}, torch {self.torch}, "
            f"kernels: {self.kernels}, {self.date}; reads {self.read_bandwidth / 1e9:.1f} GB/s{rate}"
        )


def measure_machine() -> Machine:
    """Measure this machine with the threads that torch uses now; takes a second."""
    return Machine(
        cpu_name(),
        torch.get_num_threads(),
        torch.__version__,
        native.describe(),
        datetime.now(UTC).date().isoformat(),
        Memory().bandwidth(),
        integer_rate(),
    )


def cpu_name() -> str:
    """The processor as the operating system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


class Memory:
    """Memory that no cache holds, on huge pages where the system gives them, as packed weights are; for reading it."""

    piece = _PIECE
    """Bytes of one `read`."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, _BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._all = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
        self._pieces = self._all.split(_PIECE // 4)

    def read(self, turn: int) -> None:
        """One piece, another every turn."""
        self._pieces[turn % len(self._pieces)].sum()

    def bandwidth(self) -> float:
        """Bytes a second of reading all of it, the best of five."""
        times: list[float] = []
        for _ in range(5):
            begun = time.perf_counter()
            self._all.sum()
            times.append(time.perf_counter() - begun)
        return _BYTES / min(times)


def product_rate(
    device: torch.device,
    dtype: torch.dtype,
    size: int = 1024,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Operations a second (additions and multiplications) of a product of square matrices, the best of three.

    Args:
        device: where.
        dtype: of the matrices.
        size: of their sides; enough for the caches' and threads' best on a CPU, 8192 for a GPU's.
        clock: what tells seconds: `time.process_time` for one thread on a busy machine.
    """
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    for _ in range(4):  # the first one warms up
        begun = clock()
        float((left @ right)[0, 0])  # reading waits for a GPU
        times.append(clock() - begun)
    return 2 * size**3 / min(times[1:])


def integer_rate() -> float | None:
    """Multiply-adds a second that the instruction set in use does with everything in registers, the best of five."""
    module = native.compiled()
    if module is None:
        return None
    rates: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        products = module.integer_peak(1 << 20, torch.get_num_threads())
        rates.append(products / (time.perf_counter() - begun))
    return max(rates)
