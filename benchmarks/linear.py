"""One packed linear layer against what PyTorch offers on the same CPU, in the same run.

    python benchmarks/linear.py                              # one thread, 4096 x 4096 and 640 x 640
    BELLBOX_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/linear.py --bits 4

Our side is the whole operation: rotation, statistic, codes, integer product, scales; bf16 in and bf16 out, as in
torch's bf16; torch fp32 gets fp32. `_int_mm` is the bare product of int8 matrices, already quantized. The contenders
take turns round by round; medians, with the quartiles. Weights are several copies in rotation, together larger than
the last-level cache (`--hot` for a single one).

The floor of a decode (one row) is reading the packed weights at the bandwidth measured in the same run, on huge
pages; that of a prefill is multiply-adds at the processor's integer rate.
"""

from __future__ import annotations

import argparse
import copy
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

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
    return bb.convert(prepared.eval())


def read_bandwidth() -> float:
    """Bytes per second of reading memory that no cache holds."""
    memory = mmap.mmap(-1, 1 << 29)
    memory.madvise(mmap.MADV_HUGEPAGE)
    source = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
    times = []
    for _ in range(9):
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
def measure(out: int, inputs: int, args: argparse.Namespace, bandwidth: float) -> None:
    def copies(bits: int) -> int:
        return 1 if args.hot else min(32, max(2, 8 * COLD_BYTES // (out * inputs * bits)))

    fp32 = [torch.randn(out, inputs) for _ in range(copies(32))]
    bf16 = [torch.randn(out, inputs, dtype=torch.bfloat16) for _ in range(copies(16))]
    int8 = [torch.randint(-8, 8, (out, inputs), dtype=torch.int8) for _ in range(copies(8))]
    packed = {}
    for bits in args.bits:
        layer = packed_layer(out, inputs, bits)
        packed[bits] = [layer] + [copy.deepcopy(layer) for _ in range(copies(bits) - 1)]
        for each in packed[bits]:
            each(torch.randn(1, inputs))  # packs for the machine
    for rows in args.rows:
        x = torch.randn(rows, inputs)
        half, codes = x.bfloat16(), torch.randint(-8, 8, (rows, inputs), dtype=torch.int8)

        def of(weights: Sequence[Any], product: Callable[[Any], Tensor]) -> Callable[[int], object]:
            return lambda turn: product(weights[turn % len(weights)])

        contenders = {
            "torch fp32": of(fp32, lambda w, x=x: nn.functional.linear(x, w)),
            "torch bf16": of(bf16, lambda w, x=half: nn.functional.linear(x, w)),
            "torch._int_mm": of(int8, lambda w, x=codes: torch._int_mm(x, w.t())),
        }
        for bits, layers in packed.items():
            contenders[f"Bellbox {bits} bits"] = of(layers, lambda layer, x=half: layer(x))
        title = f"{out} x {inputs}, {rows} row{'s' if rows > 1 else ''}"
        show(title, rounds(contenders, args.seconds), rows * out * inputs, bandwidth if rows == 1 else 0)


def show(title: str, times: dict[str, list[float]], products: int, bandwidth: float) -> None:
    fp32, bf16 = (statistics.median(times[name]) for name in ("torch fp32", "torch bf16"))
    print(f"\n{title}")
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        spread = f"({low * 1e6:.1f} to {high * 1e6:.1f})"
        line = f"  {name:16}{middle * 1e6:10.1f} us  {spread:22}{fp32 / middle:7.2f} x fp32{bf16 / middle:7.2f} x bf16"
        line += f"{2 * products / middle / 1e9:8.0f} GOPS"
        if name.startswith("Bellbox") and bandwidth:
            line += f", {products * int(name.split()[1]) / 8 / bandwidth / middle:.0%} of the read bandwidth"
        print(line, flush=True)


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
        f"reads {bandwidth / 1e9:.0f} GB/s, weights {'hot' if args.hot else 'in rotation'}"
    )
    for shape in args.shapes:
        out, inputs = map(int, shape.split("x"))
        measure(out, inputs, args, bandwidth)


if __name__ == "__main__":
    main()
