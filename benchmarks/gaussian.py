"""How every method codes Gaussian weights: bits carried by a code, and squared error, as a Markdown table.

    python benchmarks/gaussian.py

Each method as it starts, unrotated, on 2048 rows of 1024 standard normal numbers (seed 0). The error is that of `x_hat`
against the weight; BBQ does not aim at it.
"""

from __future__ import annotations

import torch

import bellbox as bb
from bellbox.core.entropy import code_counts, entropy_bits
from bellbox.errors import BellboxError
from bellbox.quantizers import METHODS, build_quantizer

COUNTS = (2, 3, 4, 8, 16)


@torch.no_grad()
def cell(method: str, n: int, weight: torch.Tensor) -> str:
    try:
        q = build_quantizer(bb.QuantizerSpec(method, n, block=1), weight.shape[1], len(weight), "weight")
    except BellboxError:
        return "-"
    q.initialize(weight)
    bits = entropy_bits(code_counts(q.codes(weight), n))
    return f"{bits:.3f} / {float((q(weight) - weight).square().mean()):.4f}"


def main() -> None:
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    print("| method |", " | ".join(f"n = {n}" for n in COUNTS), "|")
    print("|---|" + "---|" * len(COUNTS))
    for method in METHODS:
        print(f"| `{method}` |", " | ".join(cell(method, n, weight) for n in COUNTS), "|")


if __name__ == "__main__":
    main()
