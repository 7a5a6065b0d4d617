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

from bellbox.kernels import native
from bellbox.levels import Levels
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
            levels = Levels.gaussian(2**bits)
            for rule in (("static", 1.0), ("rms", 0.0)):
                show(
                    f"{bits} bits, {rule[0]}",
                    lambda turn, xs=xs, levels=levels, rule=rule: native.encode(
                        xs[turn % len(xs)], levels, 128, *rule
                    ),
                )


if __name__ == "__main__":
    main()
