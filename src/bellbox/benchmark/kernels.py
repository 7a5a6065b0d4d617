"""One packed layer against torch's own, over shapes, rows and bits.

Our side is the whole operation, from bf16 input to bf16 output: rotation, granularity, codes, product, scales. Weights
are several copies in rotation, together larger than the last-level cache, unless they shall be hot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.benchmark.machine import Machine, Memory
from bellbox.benchmark.timing import Spread, take_turns
from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size
from bellbox.nn import InputCoding, PackedLinear
from bellbox.nn.huge_pages import gather_in_huge_pages
from bellbox.ops.weight_layout import prepack
from bellbox.utils.processor import fast_bf16, fast_int8

SHAPES = ((640, 640), (2048, 2048), (4096, 4096), (11008, 4096))
"""Outputs and inputs."""
ROWS = (1, 16, 256, 2048)
COLD_BYTES = 128 << 20
"""What copies in rotation come to together."""


@dataclass(frozen=True)
class KernelResult:
    """One contender on one shape."""

    name: str
    outputs: int
    inputs: int
    rows: int
    hot: bool
    seconds: Spread
    weight_bytes: int
    """What a call has to read of weights."""
    read_fraction: float
    """Time to read the weights once at the bandwidth that reading memory reached in the same turns, over the measured
    time."""
    integer_fraction: float | None
    """Time of the multiply-adds at the machine's integer rate, over the measured time."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def random_layer(outputs: int, inputs: int, bits: int) -> PackedLinear:
    """A packed layer of random codes, as 2**bits levels with a rotation give it; packed for the machine."""
    levels = Levels.gaussian(2**bits)
    layer = PackedLinear(inputs, outputs, levels.grid, InputCoding(levels, block_size(inputs)), bias=False)
    codes = torch.randint(0, levels.n, (outputs, inputs), dtype=torch.uint8)
    layer.packed = prepack(codes, levels.n)
    layer.weight_scale.fill_(inputs**-0.5)
    layer.act_scale.fill_(1.0)
    gather_in_huge_pages(layer)
    return layer


def in_rotation(make: Callable[[], Any], nbytes: int, hot: bool) -> list[Any]:
    """As many copies as it takes that no cache holds them all; one where they shall be hot."""
    return [make() for _ in range(1 if hot else max(2, min(64, -(-COLD_BYTES // max(1, nbytes)))))]


def _turns(copies: list[Any], call: Callable[[Any], object]) -> Callable[[int], object]:
    return lambda turn: call(copies[turn % len(copies)])


def bench_kernels(
    machine: Machine,
    outputs: int,
    inputs: int,
    rows: int,
    bits: Sequence[int] = (4, 3, 2, 1),
    *,
    hot: bool = False,
    seconds: float = 2.0,
    more: Callable[[Tensor, Callable[[Callable[[], Any], int], list[Any]]], dict[str, Any]] | None = None,
) -> list[KernelResult]:
    """Time packed layers of some bit widths and torch's fp32 layer, in turns; its bf16 layer and its int8 product, too,
    where the processor has units for them (without, they are slower than fp32 and take the time of all the others).

    Args:
        machine: measured with the threads that are used now.
        outputs: rows of the weight.
        inputs: columns of the weight.
        rows: of the input.
        bits: of weights and activations.
        hot: one weight in the caches instead of many in rotation.
        seconds: for all together.
        more: further contenders by name, as (callable of the round, bytes of its weight), given the bf16 input and a
            function that makes copies for the rotation.

    Returns:
        One result a contender.
    """
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    count = outputs * inputs

    def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
        return in_rotation(make, nbytes, hot)

    contenders: dict[str, tuple[Callable[[int], object], int]] = {}
    wide = copies(lambda: torch.randn(outputs, inputs), 4 * count)
    x_wide = x.float()
    contenders["torch fp32"] = _turns(wide, lambda w: F.linear(x_wide, w)), 4 * count
    if fast_bf16():
        half = copies(lambda: torch.randn(outputs, inputs, dtype=torch.bfloat16), 2 * count)
        contenders["torch bf16"] = _turns(half, lambda w: F.linear(x, w)), 2 * count
    if fast_int8():
        codes = torch.randint(-8, 8, (rows, inputs), dtype=torch.int8)
        int8 = copies(lambda: torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8), count)
        int_mm = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
        contenders["torch _int_mm, product alone"] = _turns(int8, lambda w: int_mm(codes, w.t())), count
    for width in bits:
        nbytes = count * width // 8
        layers = copies(lambda width=width: random_layer(outputs, inputs, width), nbytes)
        contenders[f"Bellbox {width} bit{'s' if width > 1 else ''}"] = (
            _turns(layers, lambda layer: layer(x)),
            nbytes,
        )
    if more is not None:
        contenders.update(more(x, copies))
    memory = Memory()
    with torch.no_grad():
        turns = {"reading": memory.read} | {name: run for name, (run, _) in contenders.items()}
        times = take_turns(turns, seconds)
    bandwidth = memory.piece / times.pop("reading").median
    return [
        KernelResult(
            name,
            outputs,
            inputs,
            rows,
            hot,
            spread,
            contenders[name][1],
            contenders[name][1] / bandwidth / spread.median,
            None if machine.integer_rate is None else rows * count / machine.integer_rate / spread.median,
        )
        for name, spread in times.items()
    ]
