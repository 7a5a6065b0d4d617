"""The loss of 2,048 next tokens and its gradient, beside torch's chain, in turns in one process.

    python benchmarks/cross_entropy.py --threads 1

Floor: bf16 logits are read three times and written once; the exponential of each is taken twice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.ops.cross_entropy import cross_entropy
from bellbox.utils.malloc import keep_freed_memory

ROWS = 2048


def torch_s(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": torch_s, "bellbox": cross_entropy}
    print(f"{ROWS} rows, {args.threads} thread(s), torch {torch.__version__}; ms, median (quartiles)")
    for classes in (4096, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            logits = (torch.randn(ROWS, classes) * 2).to(dtype).requires_grad_()
            targets = torch.randint(classes, (ROWS,))
            times: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(args.rounds + 2):
                for name, loss in ways.items():
                    logits.grad = None
                    begun = time.perf_counter()
                    loss(logits, targets).backward()
                    if turn >= 2:
                        times[name].append((time.perf_counter() - begun) * 1e3)
            cells = []
            for name, found in times.items():
                low, middle, high = statistics.quantiles(found, n=4)
                cells.append(f"{name} {middle:6.1f} ({low:.1f}-{high:.1f})")
            ratio = statistics.median(a / b for a, b in zip(times["torch"], times["bellbox"], strict=True))
            print(f"{classes:6} classes, {str(dtype)[6:]:8}  {'  '.join(cells)}  {ratio:.2f} x")


if __name__ == "__main__":
    main()
