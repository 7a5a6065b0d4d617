"""One packed linear layer against what PyTorch offers on the same CPU, in the same run.

    python benchmarks/linear.py                              # one thread, 4096 x 4096 and 640 x 640
    BELLBOX_ISA=avx2 python benchmarks/linear.py --bits 4

Our side is the whole operation: rotation, statistic, codes, integer product, scales; bf16 in and bf16 out, as in
torch's bf16. `_int_mm` is the bare product of int8 matrices, already quantized. The contenders take turns round
by round; medians, with the quartiles of ours. Weights are several copies in rotation, together larger than the
last-level cache (`--hot` for a single one).

The floor of a decode (one row) is reading the packed weights at the bandwidth measured in the same run; that of
a prefill is multiply-adds at the processor's integer rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.kernels import native
from step_time import cpu_name

COLD_BYTES = 256 << 20


def packed_layer(out_features: int, in_features: int, bits: int) -> nn.Module:
    layer = nn.Linear(in_features, out_features, bias=False)
    prepared = bb.prepare(layer, bb.Recipe.bbq(bits))
    with torch.no_grad():
        prepared(torch.randn(4, in_features))
    packed = bb.convert(prepared.eval())
    packed(torch.randn(1, in_features))  # packs for the machine
    return packed


def read_bandwidth() -> float:
    """Bytes per second of reading memory that no cache holds."""
    source = torch.ones(1 << 27)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        source.sum()
        times.append(time.perf_counter() - start)
    return source.numel() * 4 / min(times)


def rounds(contenders: dict[str, Callable[[int], object]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        for turn in range(3):
            run(turn)
    deadline = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < deadline or turn < 5:
        for name, run in contenders.items():
            start = time.perf_counter()
            run(turn)
            times[name].append(time.perf_counter() - start)
        turn += 1
    return times


@torch.no_grad()
def measure(
    out: int, inputs: int, rows: int, all_bits: list[int], hot: bool, seconds: float, bandwidth: float
) -> None:
    copies = 1 if hot else max(2, COLD_BYTES // (out * inputs * 2))
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    codes = torch.randint(-8, 8, (rows, inputs), dtype=torch.int8)
    bf16 = [torch.randn(out, inputs, dtype=torch.bfloat16) for _ in range(copies)]
    int8 = [torch.randint(-8, 8, (out, inputs), dtype=torch.int8) for _ in range(copies)]

    def of(weights: list[Tensor], product: Callable[[Tensor], Tensor]) -> Callable[[int], object]:
        return lambda turn: product(weights[turn % len(weights)])

    contenders: dict[str, Callable[[int], object]] = {
        "torch bf16": of(bf16, lambda w: nn.functional.linear(x, w)),
        "torch._int_mm": of(int8, lambda w: torch._int_mm(codes, w.t())),
    }
    for bits in all_bits:
        one = packed_layer(out, inputs, bits)
        copies_here = 1 if hot else max(2, 8 * COLD_BYTES // (out * inputs * bits) // 2)
        layers = [one] + [packed_layer(out, inputs, bits) for _ in range(min(copies_here, 24) - 1)]
        contenders[f"Bellbox {bits} bits"] = lambda turn, layers=layers: layers[turn % len(layers)](x)
    times = rounds(contenders, seconds)
    base = statistics.median(times["torch bf16"])
    print(
        f"\n{out} x {inputs}, {rows} row{'s' if rows > 1 else ''}, weights {'hot' if hot else 'in rotation'}"
    )
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        line = f"  {name:16}{middle * 1e6:10.1f} us  ({low * 1e6:.1f} to {high * 1e6:.1f}){base / middle:7.2f} x bf16"
        line += f"{2 * rows * out * inputs / middle / 1e9:8.0f} GOPS"
        if name.startswith("Bellbox") and rows == 1:
            floor = out * inputs * int(name.split()[1]) / 8 / bandwidth
            line += f", {floor / middle:.0%} of the read bandwidth"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 1])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "640x640"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 2048])
    parser.add_argument("--hot", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    print(
        f"{cpu_name()}, torch {torch.__version__}, kernels {native.describe()}, {args.threads} thread(s), "
        f"reads {bandwidth / 1e9:.0f} GB/s"
    )
    for shape in args.shapes:
        out, inputs = map(int, shape.split("x"))
        for rows in args.rows:
            measure(out, inputs, rows, args.bits, args.hot, args.seconds, bandwidth)


if __name__ == "__main__":
    main()
