"""The activation kernel alone: rows of floats to integer levels, on one core.

    python benchmarks/encode.py
    BELLBOX_ISA=avx2 python benchmarks/encode.py --rows 64

Rotation by blocks of 128, statistic, thresholds, codes, row sums. The default input is larger than the second-level
cache and smaller than the third; it is worked through 128 rows at a time, as a layer does, so that the codes stay in
the cache. GB/s count the bytes of the input, as does the line of a plain copy of the same input to bytes
(`.to(int8)`) and of a sum, which only reads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bellbox.core.grid import Levels
from bellbox.ops import native
from step_time import cpu_name


def quartiles(run: Callable[[int], object], seconds: float) -> list[float]:
    times = []
    run(0)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 5:
        start = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    module = native.compiled()
    if module is None:
        parser.error(f"there are no compiled kernels to time: {native.describe()}")
    integers = torch.empty(128, -(-args.features // 64) * 64, dtype=torch.int8)
    sums, row_scales = torch.empty(128, dtype=torch.int32), torch.empty(128)

    def encode(x: torch.Tensor, coding: native.Coding) -> None:
        """As a layer does it: what a call makes anew in `native.encode` is there already."""
        rows, features = x.shape
        outs = integers.data_ptr(), integers.shape[1], sums.data_ptr(), row_scales.data_ptr()
        kind = int(x.dtype == torch.bfloat16)
        module.encode(x.data_ptr(), kind, rows, features, features, coding.handle, *outs, 1)

    print(f"{cpu_name()}, kernels {native.describe()}, {args.rows} x {args.features}, one thread")
    for dtype in (torch.float32, torch.bfloat16):
        xs = torch.randn(args.rows, args.features).to(dtype).split(128)
        size = xs[0].numel() * xs[0].element_size()

        def show(name: str, run: Callable[[int], object], size: int = size) -> None:
            low, middle, high = quartiles(run, args.seconds)
            spread = f"({low * 1e6:.0f} to {high * 1e6:.0f})"
            print(f"  {name:28}{middle * 1e6:9.0f} us {spread:16}{size / middle / 1e9:6.1f} GB/s")

        print(str(dtype).removeprefix("torch."))
        show("sum (torch)", lambda turn, xs=xs: xs[turn % len(xs)].sum())
        show("to int8 (torch)", lambda turn, xs=xs: xs[turn % len(xs)].to(torch.int8))
        for bits in (4, 3, 2, 1):
            for rule in (("static", 1.0), ("rms", 0.0)):
                coding = native.Coding(Levels.gaussian(2**bits), 128, *rule)
                show(
                    f"{bits} bits, {rule[0]}",
                    lambda turn, xs=xs, coding=coding: encode(xs[turn % len(xs)], coding),
                )


if __name__ == "__main__":
    main()
