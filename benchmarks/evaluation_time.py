"""Evaluation of a prepared model beside the plain and the packed one: layers of the 95M shape, in turns in one process.

python benchmarks/evaluation_time.py                 # 2 bits, fp32, all cores
python benchmarks/evaluation_time.py --bits 4 --rounds 15
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time

import torch

import bellbox as bb
from bellbox.models import build, preset
from bellbox.ops import native


def main() -> None:
    """Print medians, quartiles and the median of the rounds' ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config = dataclasses.replace(preset("95M"), num_hidden_layers=args.layers, vocab_size=1024)
    plain = build(config).eval()
    tokens = torch.randint(0, config.vocab_size, (4, 512))
    prepared = bb.prepare(copy.deepcopy(plain), bb.Recipe.bbq(args.bits))
    bb.calibrate(prepared, [tokens])
    contenders = {"plain fp32": plain, "prepared": prepared.eval(), "packed": bb.convert(prepared)}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for turn in range(args.rounds + 2):  # two to warm up
            for name, model in contenders.items():
                start = time.perf_counter()
                model(tokens)
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - start)
    print(
        f"{args.bits} bits, kernels {native.describe()}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(a / b for a, b in zip(times, seconds["plain fp32"], strict=True))
        print(f"{name:<12}{1e3 * middle:8.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f}){ratio:8.2f} x")


if __name__ == "__main__":
    main()
