"""Evaluation of a prepared model beside the plain and the packed one: layers of the 95M shape, in turns in one process.

python benchmarks/evaluation_time.py                 # 2 bits, fp32, all cores
python benchmarks/evaluation_time.py --bits 4 --seconds 60
"""

from __future__ import annotations

import argparse
import copy
import dataclasses

import torch

import bellbox as bb
from bellbox.benchmark.timing import take_turns
from bellbox.models import build, preset
from bellbox.ops import native


def main() -> None:
    """Print medians, quartiles and the ratio of the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    config = dataclasses.replace(preset("95M"), num_hidden_layers=args.layers, vocab_size=1024)
    plain = build(config).eval()
    tokens = torch.randint(0, config.vocab_size, (4, 512))
    prepared = bb.prepare(copy.deepcopy(plain), bb.Recipe.bbq(args.bits))
    bb.calibrate(prepared, [tokens])
    contenders = {"plain fp32": plain, "prepared": prepared.eval(), "packed": bb.convert(prepared)}
    with torch.inference_mode():
        found = take_turns(
            {name: lambda _, model=model: model(tokens) for name, model in contenders.items()}, args.seconds
        )
    print(f"{args.bits} bits, kernels {native.describe()}, {torch.get_num_threads()} threads")
    plain_seconds = found["plain fp32"].median
    for name, each in found.items():
        spread = f"{1e3 * each.median:8.0f} ms ({1e3 * each.low:.0f} to {1e3 * each.high:.0f})"
        print(f"{name:<12}{spread}{each.median / plain_seconds:8.2f} x")


if __name__ == "__main__":
    main()
