"""Benchmarks: contenders that take turns in one run, beside what the machine itself can do.

`bellbox bench` prints it; `benchmarks/peers` adds other libraries to the same rounds.
"""

from bellbox.benchmark.kernels import SHAPES, KernelResult, bench_kernels
from bellbox.benchmark.machine import Machine, measure_machine
from bellbox.benchmark.model import ModelResult, bench_model
from bellbox.benchmark.timing import Spread, take_turns

__all__ = [
    "SHAPES",
    "KernelResult",
    "Machine",
    "ModelResult",
    "Spread",
    "bench_kernels",
    "bench_model",
    "measure_machine",
    "take_turns",
]
