"""Packed layers of many shapes called from several threads at once, every result held against the reference.

    python benchmarks/stress.py                  # ten minutes, four threads
    python benchmarks/stress.py --minutes 0.5 --threads 8

Each thread draws layers (1 to 4 bits, odd sizes, siblings, both statistics) and inputs (1 to 300 rows, fp32 and bf16)
at random and compares bits with what the torch reference gave before any thread started. The kernels' own threads
change in number on the way. Ends with 1 at the first wrong result.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time

import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.ops import native

SIZES = [1, 16, 63, 64, 130, 257, 640, 1100]
ROWS = [1, 2, 3, 5, 8, 17, 64, 70, 129, 300]


class Case:
    """A packed layer, its inputs, and what the reference makes of each."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        inputs, outputs = rng.choice(SIZES), rng.choice(SIZES)
        weight, activation = (rng.choice([2, 3, 4, 8, 16]) for _ in range(2))
        recipe = bb.Recipe.bbq(
            weight_levels=weight, activation_levels=activation, statistic=rng.choice(["token", "ema"])
        )
        model = bb.prepare(nn.Linear(inputs, outputs, bias=rng.random() < 0.5), recipe)
        with torch.no_grad():
            model(torch.randn(7, inputs))
            model.eval()
            self.name = f"{outputs} x {inputs}, {weight} and {activation} levels"
            self.layer = bb.convert(model)
            self.xs = [torch.randn(rows, inputs) for rows in rng.sample(ROWS, 4)]
            self.xs += [x.bfloat16() for x in self.xs[:2]]
            self.expected: list[Tensor] = [model(x) for x in self.xs]


def work(cases: list[Case], seed: int, deadline: float, calls: list[int], wrong: list[str]) -> None:
    rng = random.Random(seed)
    while time.perf_counter() < deadline and not wrong:
        case = rng.choice(cases)
        i = rng.randrange(len(case.xs))
        torch.set_num_threads(rng.choice([1, 2, 3]))
        if not torch.equal(case.layer(case.xs[i]), case.expected[i]):
            wrong.append(f"{case.name}, {len(case.xs[i])} rows, {case.xs[i].dtype}")
        calls[seed] += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=60)
    args = parser.parse_args()
    cases = [Case(seed) for seed in range(args.layers)]
    calls, wrong = [0] * args.threads, []
    start = time.perf_counter()
    deadline = start + 60 * args.minutes
    threads = [
        threading.Thread(target=work, args=(cases, i, deadline, calls, wrong)) for i in range(args.threads)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(timeout=15)
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{minutes:5.1f} of {args.minutes:g} minutes, {sum(calls)} calls, {len(wrong)} wrong", flush=True
        )
    for line in wrong:
        print(f"wrong: {line}")
    print(f"kernels {native.describe()}, {args.threads} threads: {sum(calls)} calls, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
