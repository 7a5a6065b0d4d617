"""What the entropy objective costs: forward and backward by number of experts, fp32, one thread.

python benchmarks/mec.py
"""

from __future__ import annotations

import statistics
import time

import torch

from bellbox.objectives import mec_loss


def milliseconds(features: torch.Tensor, repeats: int = 9, **options) -> tuple[float, float]:
    """Median, and the spread from the first to the third quartile."""
    times = []
    for _ in range(repeats + 1):
        features.grad = None
        begun = time.perf_counter()
        mec_loss(features, **options).backward()
        times.append(1e3 * (time.perf_counter() - begun))
    low, middle, high = statistics.quantiles(times[1:], n=4)
    return middle, high - low


def main() -> None:
    torch.set_num_threads(1)
    for m, d in ((128, 512), (1024, 512), (4096, 1024)):
        features = torch.randn(m, d).requires_grad_()
        cells = []
        for experts in (1, 2, 4, 8, 16):
            middle, spread = milliseconds(features, experts=experts)
            value = float(mec_loss(features.detach(), experts=experts))
            cells.append(f"K={experts}: {middle:.2f} +- {spread / 2:.2f} ms, {value:.4f}")
        middle, spread = milliseconds(features, form="taylor")
        print(
            f"m={m} d={d}  " + "; ".join(cells) + f"; taylor: {middle:.2f} +- {spread / 2:.2f} ms", flush=True
        )


if __name__ == "__main__":
    main()
