"""The model of `bellbox plan cluster` held against what can be measured on one machine.

    python benchmarks/scaling.py              # processor time of one thread: about two minutes on a quiet machine
    python benchmarks/scaling.py --passes     # what the quantizers of `scaling/cost.py` take, on torch operations alone

*Steps*: forward and backward of small models beside the model's time, with this machine's own rates: products as
`product_rate` measures them, passes as reading memory takes. *Collectives*: two gloo processes; a line through two
sizes foresees a third.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable

if __name__ == "__main__" and "--passes" in os.sys.argv:
    os.environ["BELLBOX_BACKEND"] = "reference"

import torch
from torch.nn import functional as F

import bellbox as bb
from bellbox.benchmark.machine import cpu_name, product_rate
from bellbox.models import LlamaConfig, build
from bellbox.scaling.cost import Network

CONTEXT, ROWS = 256, 4


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Processor time, the median after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return statistics.median(times[1:])


def read_time(size: int) -> float:
    """Seconds of one reading of so many fp32 numbers that no cache holds."""
    memory = torch.ones(1 << 26)
    return seconds(memory.sum) * size / memory.numel()


def quantizer_passes(width: int, rows: int) -> tuple[float, float]:
    """Readings of its tensor that the quantizer of a weight and of an input take, forward and backward."""
    layer = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
    bb.prepare(layer, bb.Recipe.bbq(bits=2))
    layer.train()
    (only,) = layer
    x = torch.randn(rows, width, requires_grad=True)
    layer(x)

    def weight() -> None:
        out = only.weight_quantizer(only.stored_weight)
        out.backward(torch.ones_like(out))

    def inputs() -> None:
        out = only.activation_quantizer.quantizer(x)
        out.backward(torch.ones_like(out))

    return tuple(
        seconds(work) / read_time(tensor.numel())
        for work, tensor in ((weight, only.stored_weight), (inputs, x))
    )


def steps() -> None:
    """Measured and foreseen steps of small models, full precision and 2 bits, in turns."""
    rate = product_rate(torch.device("cpu"), torch.float32, 1024, time.process_time)
    weight_passes, input_passes = quantizer_passes(640, CONTEXT * ROWS)
    one = read_time(1)
    print(
        f"{cpu_name()}, one thread, processor time; products {rate / 1e9:.1f} G/s, reading {4 / one / 1e9:.1f} GB/s"
    )
    print(f"passes of the quantizers: weight {weight_passes:.0f}, input {input_passes:.0f}")
    print(
        "| width x blocks | method | measured, s | foreseen, s | measured / foreseen |\n|---|---|---|---|---|"
    )
    for width, layers in ((256, 2), (256, 4), (640, 2)):
        shape = LlamaConfig(4096, width, 5 * width // 2, layers, 4, max_position_embeddings=CONTEXT)
        network = Network(shape)
        tokens = torch.randint(0, 4096, (ROWS, CONTEXT + 1))
        for method in ("none", "bbq, 2 bits"):
            model = build(shape, seed=0)
            if method != "none":
                bb.prepare(model, bb.Recipe.bbq(bits=2))
            model.train()

            def step(model: torch.nn.Module = model, tokens: torch.Tensor = tokens) -> None:
                logits = model(tokens[:, :-1]).flatten(0, 1)
                F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()

            foreseen = network.operations(CONTEXT) * ROWS * CONTEXT / rate
            if method != "none":
                inputs = input_passes * network.inputs * ROWS * CONTEXT
                foreseen += (weight_passes * network.quantized + inputs) * one
            taken = seconds(step, 3)
            print(
                f"| {width} x {layers} | {method} | {taken:.2f} | {foreseen:.2f} | {taken / foreseen:.2f} |",
                flush=True,
            )


def _reduce(rank: int, port: int, sizes: list[int], answers: mp.Queue) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for size in sizes:
        tensor, times = torch.ones(size), []
        for _ in range(12):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - begun)
        found.append(statistics.median(times[2:]))
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def collectives() -> None:
    """All-reduce of two processes: seconds = latency + bytes / rate, from two sizes, beside a third."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes, context = [1 << 16, 1 << 23, 1 << 21], mp.get_context("spawn")
    answers: mp.Queue = context.Queue()
    both = [context.Process(target=_reduce, args=(rank, port, sizes, answers)) for rank in range(2)]
    for process in both:
        process.start()
    small, large, between = answers.get(timeout=300)
    for process in both:
        process.join()
    slope = (large - small) / (sizes[1] - sizes[0])
    foreseen = small + slope * (sizes[2] - sizes[0])
    print(
        f"all-reduce, two gloo processes: {4 / slope / 1e9:.2f} GB/s; 8 MiB measured {between * 1e3:.1f} ms, foreseen "
        f"{foreseen * 1e3:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", action="store_true")
    torch.set_num_threads(1)
    if parser.parse_args().passes:
        for width, rows in ((1024, 1024), (2048, 512)):
            weight, inputs = quantizer_passes(width, rows)
            print(
                f"width {width}: weight {weight:.0f}, input {inputs:.0f} readings of the tensor ({cpu_name()})"
            )
        return
    steps()
    collectives()


if __name__ == "__main__":
    main()
