"""What CEWT adds to a training step of the 95M model: the sort of every quantized matrix, and the hyperball.

    python benchmarks/cewt.py                    # 2 threads
    python benchmarks/cewt.py --json cewt.json
    python benchmarks/cewt.py --threads 1 --cpu-time     # on a machine that has other work: time of the processor

Three things are timed in one process: forward and backward of one micro-batch (2 bits, bf16 autocast), the optimizer
step plain and with CEWT, which take turns, and ways to rank one matrix of the MLP. The share of a step follows for
several batch sizes: CEWT's cost does not depend on the tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.models import build, preset
from bellbox.runs.config import CewtSection, OptimizerSection
from bellbox.training.optim.groups import ModelOptimizer
from step_time import cpu_name

TOKENS, CONTEXT, VOCABULARY = 2048, 512, 32000


clock = time.perf_counter


def timed(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def model(rotated: bool) -> nn.Module:
    network = build(preset("95M", vocab_size=VOCABULARY), seed=0)
    return bb.prepare(network, bb.Recipe.bbq(2, weights_rotated=rotated))


def ranking(weight: torch.Tensor, rounds: int) -> dict[str, float]:
    """Seconds for each way to rank a matrix."""
    flat = weight.detach().flatten()
    bits = flat.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    ways: dict[str, Callable[[], object]] = {
        "fp32, torch.sort": lambda: torch.sort(flat),
        "fp32, torch.sort, stable": lambda: torch.sort(flat, stable=True),
        "its bits as int32": lambda: torch.sort(keys, stable=True),
    }
    return {name: statistics.median(timed(way) for _ in range(rounds)) for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process, in place of the clock on the wall"
    )
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    global clock
    clock = time.process_time if args.cpu_time else clock

    plain, constrained = model(rotated=False), model(rotated=True)
    tokens = torch.randint(
        VOCABULARY, (TOKENS // CONTEXT, CONTEXT + 1), generator=torch.Generator().manual_seed(1)
    )

    def forward_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = plain(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    passes = [timed(forward_backward) for _ in range(4)][1:]
    for ours, theirs in zip(constrained.parameters(), plain.parameters(), strict=True):
        ours.grad = theirs.grad
    adamw = ModelOptimizer(plain, OptimizerSection())
    cewt = ModelOptimizer(constrained, OptimizerSection(cewt=CewtSection(every=1)))
    ways: dict[str, Callable[[], None]] = {
        "AdamW": lambda: adamw.step(1e-3),
        "AdamW, hyperball": lambda: cewt.step(1e-3, 0.02, project=False),
        "AdamW, hyperball and projection": lambda: cewt.step(1e-3, 0.02),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        for name, way in ways.items():
            seconds = timed(way)
            if turn:  # the first one allocates
                times[name].append(seconds)

    assert cewt.cewt is not None
    entries = sum(weight.numel() for weight in cewt.cewt.norms)
    print(
        f"{cpu_name()}, torch {torch.__version__}, {args.threads} threads, {entries / 1e6:.1f}M constrained weights"
    )
    rows = {name: quartiles(values) for name, values in times.items()}
    for name, (low, middle, high) in rows.items():
        print(f"{name:34}{middle * 1e3:7.0f} ms  {low * 1e3:.0f} to {high * 1e3:.0f} ms")
    added = rows["AdamW, hyperball and projection"][1] - rows["AdamW"][1]
    one_pass = statistics.median(passes)
    print(f"{'forward and backward of 2,048 tokens':34}{one_pass * 1e3:7.0f} ms")
    shares = {}
    for count in (TOKENS, 8192, 65536, 262144):
        shares[count] = added / (one_pass * count / TOKENS + rows["AdamW"][1])
        print(f"CEWT adds {added * 1e3:.0f} ms: {shares[count]:.1%} of a step of {count:,} tokens")
    found = ranking(constrained.get_parameter("model.layers.0.mlp.up_proj.weight"), args.rounds)
    for name, seconds in found.items():
        print(f"rank 640 x 1792: {name:28}{seconds * 1e3:6.1f} ms")
    if args.json:
        with open(args.json, "w") as file:
            figures = {
                "cpu": cpu_name(),
                "step_s": rows,
                "pass_s": one_pass,
                "share": shares,
                "rank_s": found,
            }
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
