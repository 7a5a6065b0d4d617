"""The time that each kernel cannot beat, from bytes and operations over the rates of the data sheets.

    python benchmarks/gpu/roofline.py                 # Markdown, as docs/gpu.md has it; needs nothing but Python

Floors, not forecasts: a kernel is as fast as its slowest of memory, tensor cores and instruction issue at best. The
instructions a number of the coding kernel are those of its machine code (benchmarks/gpu/compile.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense rates of a data sheet."""

    name: str
    bandwidth: float
    """Bytes a second."""
    bf16: float
    """Operations a second on tensor cores, sums in fp32."""
    int8: float
    issue: float
    """Instructions of threads a second: multiprocessors x 128 x boost clock."""
    double: float
    """fp64 operations a second outside of tensor cores."""


GPUS = (
    Gpu("A100 80 GB SXM", 2.039e12, 312e12, 624e12, 108 * 128 * 1.41e9, 9.7e12),
    Gpu("H100 SXM", 3.35e12, 989e12, 1979e12, 132 * 128 * 1.98e9, 33.5e12),
    Gpu("RTX 4090", 1.008e12, 165.2e12, 660.6e12, 128 * 128 * 2.52e9, 1.29e12),
    Gpu("RTX 5090", 1.792e12, 209.5e12, 838e12, 170 * 128 * 2.41e9, 1.64e12),
)
INSTRUCTIONS = {
    True: {4: 33.9, 3: 34.6, 2: 32.3, 1: 24.5},
    False: {4: 41.0, 3: 41.7, 2: 39.4, 1: 31.6},
}
"""Of the coding kernel for a number, by whether squares are summed in fp64: the loop over rows of 4096 (32 numbers a
thread), and what is before it over four rows (benchmarks/gpu/compile.py, sm_90 and sm_120). Without rare branches."""
ROTATION = 11.2
"""Instructions a number of them, at 4 bits and blocks of 128: the loop has 1007 on sm_90, and 648 at blocks of 1."""
PROMPT = 64 * 512
MODELS = {"700M": (24, 1536, 4096), "2.4B": (30, 2560, 6912)}
"""Layers, hidden and intermediate size of LLaMAs of about that size."""


def coding(gpu: Gpu, rows: int, columns: int, bits: int) -> tuple[float, float]:
    """Seconds of coding rows: by memory (2 bytes read, 1 written), and by issue of instructions or fp64."""
    numbers, wide = rows * columns, gpu.double > 5e12
    double = 2 * numbers / gpu.double if wide else 0.0
    return 3 * numbers / gpu.bandwidth, max(numbers * INSTRUCTIONS[wide][bits] / gpu.issue, double)


def free_rotation(gpu: Gpu, rows: int, columns: int, bits: int) -> float:
    """Times that coding would be faster at most if rotating cost no instruction: memory stays."""
    numbers, (memory, now) = rows * columns, coding(gpu, rows, columns, bits)
    left = now - numbers * ROTATION / gpu.issue
    return max(memory, now) / max(memory, left)


def dense_rotation(gpu: Gpu, rows: int, columns: int, pieces: int, block: int = 128) -> float:
    """Seconds of a product with a matrix of +-1 for each block, of bf16 `pieces` that an input is the sum of."""
    return 2 * rows * columns * block * pieces / gpu.bf16


def product(gpu: Gpu, rows: int, outputs: int, columns: int, bits: float, rate: float, act: int) -> float:
    """Seconds of a product: operations over the rate, or bytes of weights, input and bf16 result over the bandwidth."""
    moved = outputs * columns * bits / 8 + rows * columns * act + rows * outputs * 2
    return max(2 * rows * outputs * columns / rate, moved / gpu.bandwidth)


def low_bit(gpu: Gpu, rows: int, outputs: int, columns: int, bits: int, coded: bool = True) -> float:
    """Seconds of a packed layer; `coded` counts the coding of its input."""
    own = max(coding(gpu, rows, columns, bits)) if coded else 0.0
    return own + product(gpu, rows, outputs, columns, bits, gpu.int8, 1)


def bf16(gpu: Gpu, rows: int, outputs: int, columns: int) -> float:
    """Seconds of a bf16 layer."""
    return product(gpu, rows, outputs, columns, 16, gpu.bf16, 2)


def block(gpu: Gpu, hidden: int, inner: int, rows: int, bits: int | None) -> float:
    """Seconds of the seven products of a LLaMA block; q, k, v and gate, up share a coded input."""
    shapes = ((hidden, hidden, True), (hidden, hidden, False), (hidden, hidden, False), (hidden, hidden, True),
              (inner, hidden, True), (inner, hidden, False), (hidden, inner, True))  # fmt: skip
    if bits is None:
        return sum(bf16(gpu, rows, outputs, columns) for outputs, columns, _ in shapes)
    return sum(low_bit(gpu, rows, outputs, columns, bits, coded) for outputs, columns, coded in shapes)


def step(gpu: Gpu, rows: int, columns: int, bits: int | None) -> float:
    """Seconds of forward and backward of a square layer in training.

    Forward on int8 from codes, backward twice in bf16. Around them: the input is read for its statistic and its bytes,
    which are rearranged; both operands are decoded for the backward; its closed form reads gradient and bytes.
    """
    once = bf16(gpu, rows, columns, columns)
    if bits is None:
        return 3 * once
    numbers, weights = rows * columns, columns * columns
    moved = numbers * (2 + 3 + 2 + 3 + 5) + weights * (4 + 5 + 2 + 3 + 9)
    return product(gpu, rows, columns, columns, bits, gpu.int8, 1) + 2 * once + moved / gpu.bandwidth


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    heads = list(head)
    lines = [heads, ["---"] * len(heads), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def micro(seconds: float) -> str:
    """Microseconds, three digits."""
    return f"{seconds * 1e6:,.3g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def main() -> None:
    names = [gpu.name for gpu in GPUS]
    print("Coding of rows, 4 bits, 2048 rows, in microseconds: by memory / by instructions\n")
    print(table(("columns", *names), (
        (str(n), *(" / ".join(map(micro, coding(gpu, 2048, n, 4))) for gpu in GPUS)) for n in (1024, 2048, 4096, 8192)
    )))  # fmt: skip
    print("A rotation on tensor cores, 2048 rows of 4096, blocks of 128\n")
    print(table(("", *names), (
        ("coding, now (us)", *(micro(max(coding(gpu, 2048, 4096, 4))) for gpu in GPUS)),
        ("times faster, were rotating free", *(f"{free_rotation(gpu, 2048, 4096, 4):.2f}" for gpu in GPUS)),
        ("product with +-1, inputs of bf16 (us)", *(micro(dense_rotation(gpu, 2048, 4096, 1)) for gpu in GPUS)),
        ("the same of fp32 in three pieces (us)", *(micro(dense_rotation(gpu, 2048, 4096, 3)) for gpu in GPUS)),
    )))  # fmt: skip
    print("A packed layer, N x N, 2048 rows: microseconds, and times bf16\n")
    print(table(("N", "bits", *names), (
        (str(n), str(bits), *(
            f"{micro(low_bit(gpu, 2048, n, n, bits))} ({bf16(gpu, 2048, n, n) / low_bit(gpu, 2048, n, n, bits):.2f} x)"
            for gpu in GPUS
        )) for n in (512, 1024, 2048, 4096, 8192) for bits in (4, 2)
    )))  # fmt: skip
    print("One row, N x N: microseconds, and times bf16\n")
    print(table(("N", "bits", *names), (
        (str(n), str(bits), *(
            f"{micro(low_bit(gpu, 1, n, n, bits))} ({bf16(gpu, 1, n, n) / low_bit(gpu, 1, n, n, bits):.1f} x)"
            for gpu in GPUS
        )) for n in (4096, 8192) for bits in (4, 3, 2, 1)
    )))  # fmt: skip
    print("All products of a LLaMA, 64 x 512 tokens: milliseconds, and times bf16\n")
    print(table(("model", "bits", *names), (
        (model, str(bits), *(
            f"{layers * block(gpu, hidden, inner, PROMPT, bits) * 1e3:,.1f} "
            f"({block(gpu, hidden, inner, PROMPT, None) / block(gpu, hidden, inner, PROMPT, bits):.2f} x)"
            for gpu in GPUS
        )) for model, (layers, hidden, inner) in MODELS.items() for bits in (4, 2)
    )))  # fmt: skip
    print("Training of an N x N layer, 16,384 rows: time over that of bf16\n")
    print(table(("N", *names), (
        (str(n), *(f"{step(gpu, 16_384, n, 4) / step(gpu, 16_384, n, None):.2f}" for gpu in GPUS))
        for n in (640, 1024, 2048, 4096)
    )))  # fmt: skip


if __name__ == "__main__":
    main()
