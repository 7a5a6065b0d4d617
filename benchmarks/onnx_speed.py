"""A low-bit MLP in onnxruntime: standard operators, the custom operator, and onnxruntime's fp32 of the same shape.

python benchmarks/onnx_speed.py                                                  # one thread, one row
python benchmarks/onnx_speed.py --custom-op build/onnx/libbellbox_onnx.so        # see docs/interop.md
python benchmarks/onnx_speed.py --rows 16 --bits 4 --size 2048 --threads 2

Contenders take turns. With one thread, time is the processor's time of this process, so that other work of the machine
costs little.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bellbox as bb
from bellbox.benchmark.timing import take_turns
from bellbox.errors import require
from bellbox.interop.onnx import export


def mlp(size: int, layers: int) -> nn.Sequential:
    parts = [part for _ in range(layers) for part in (nn.Linear(size, size, bias=False), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def main(arguments: argparse.Namespace) -> None:
    runtime = require("onnxruntime", "onnx")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    x = torch.randn(arguments.rows, arguments.size)
    plain = mlp(arguments.size, arguments.layers).eval()
    low_bit = bb.prepare(
        mlp(arguments.size, arguments.layers), bb.Recipe.bbq(bits=arguments.bits, keep_ends=False)
    )
    with torch.no_grad():
        low_bit(torch.randn(4, arguments.size))
    packed = bb.convert(low_bit.eval())
    del low_bit
    options = runtime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    runs: dict[str, Callable[[int], Any]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"fp32": (plain, {}), "standard operators": (packed, {})}
        if arguments.custom_op:
            options.register_custom_ops_library(os.fspath(arguments.custom_op))
            files["custom operator"] = packed, {"custom_op": True}
        for name, (model, more) in files.items():
            path = Path(folder) / f"{name}.onnx"
            export(model, (x,), path, **more)
            sizes[name] = path.stat().st_size
            session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            runs[name] = partial(
                lambda session, feeds, _: session.run(None, feeds), session, {"input": x.numpy()}
            )
            path.unlink()

        def in_torch(_: int) -> object:
            with torch.no_grad():
                return packed(x)

        runs["packed, in torch"] = in_torch
        found = take_turns(runs, arguments.seconds)
    print(
        f"{arguments.layers} layers of {arguments.size} x {arguments.size}, {arguments.bits} bits, "
        f"{arguments.rows} rows, {arguments.threads} threads, onnxruntime {runtime.__version__}\n"
    )
    print(f"{'':<20} {'ms':>8}   {'quartiles':<17} {'x fp32':>7} {'file, MB':>9}")
    for name, spread in found.items():
        quartiles = f"{1e3 * spread.low:.3f} to {1e3 * spread.high:.3f}"
        ratio = found["fp32"].median / spread.median
        size = f"{sizes[name] / 1e6:9.2f}" if name in sizes else ""
        print(f"{name:<20} {1e3 * spread.median:8.3f}   {quartiles:<17} {ratio:7.2f} {size}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--custom-op", type=Path)
    main(parser.parse_args())
