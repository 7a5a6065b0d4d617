"""Binarized layers with inputs of 8 bits: signs and bits as they are stored against decoded weights, in turns.

python benchmarks/ptq_speed.py                          # single layers, one thread
python benchmarks/ptq_speed.py --model one-bit-folder   # tokens a second of a whole model, greedy decoding

Weights of single layers are random, a tenth of the columns salient. They stay in the cache; from memory the distance is
larger, since decoded weights are eleven times as many bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from bellbox.benchmark.timing import take_turns
from bellbox.core.binarize import BLOCK, Binarized
from bellbox.inference.generation import generate
from bellbox.ops import binarized, native
from bellbox.ptq import BinarizedLinear, load, set_activation_bits

SHAPES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--model", type=Path)
    flags.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 32])
    flags.add_argument("--seconds", type=float, default=2.0, help="of each comparison")
    flags.add_argument("--threads", type=int, default=1)
    asked = flags.parse_args()
    torch.set_num_threads(asked.threads)
    print(native.describe())
    with torch.inference_mode():
        if asked.model is not None:
            whole_model(asked.model, asked.seconds)
            return
        for shape in SHAPES:
            for rows in asked.rows:
                one_layer(*shape, rows, asked.seconds)


def layer(outputs: int, inputs: int) -> BinarizedLinear:
    """Of random weights."""
    blocks = [
        Binarized(
            torch.rand(outputs, BLOCK) < 0.5,
            torch.rand(outputs, BLOCK) < 0.5,
            torch.arange(BLOCK) % 10 == 0,
            torch.randn(outputs, 7).half(),
        )
        for _ in range(-(-inputs // BLOCK))
    ]
    last = inputs - BLOCK * (len(blocks) - 1)
    end = blocks[-1]
    assert end.bits is not None
    assert end.salient is not None
    blocks[-1] = Binarized(end.signs[:, :last], end.bits[:, :last], end.salient[:last], end.scales)
    made = BinarizedLinear.from_blocks(blocks, None, BLOCK)
    made.activation_bits = 8
    return made


def one_layer(outputs: int, inputs: int, rows: int, seconds: float) -> None:
    one, x = layer(outputs, inputs), torch.randn(rows, inputs)
    half, x_half = one.weight().bfloat16(), x.bfloat16()
    ways = {
        "stored": partial(one, x),
        "decoded": partial(decoded, one, x),
        "bf16": partial(F.linear, x_half, half),  # torch alone, its input not rounded
    }
    with patch.dict(binarized.MAX_ROWS, dict.fromkeys(binarized.MAX_ROWS, rows)):
        times = take_turns({way: lambda _turn, run=run: run() for way, run in ways.items()}, seconds)
    stored = times["stored"].median
    texts = [
        f"{way} {t.median * 1e6:,.1f} ({t.low * 1e6:,.1f} to {t.high * 1e6:,.1f})" for way, t in times.items()
    ]
    print(
        f"{outputs} x {inputs}, {rows:2} rows: {', '.join(texts)} us: "
        f"{times['decoded'].median / stored:.1f} and {times['bf16'].median / stored:.1f} x",
        flush=True,
    )


def decoded(run: Callable[..., object], *arguments: object) -> None:
    """Run without the kernel."""
    with patch.dict(binarized.MAX_ROWS, dict.fromkeys(binarized.MAX_ROWS, 0)):
        run(*arguments)


def tokens(model: nn.Module, count: int) -> None:
    for _ in generate(model, torch.ones(1, 1, dtype=torch.int64), count, temperature=0):
        pass


def whole_model(folder: Path, seconds: float, count: int = 24) -> None:
    model = load(folder)
    set_activation_bits(model, 8)
    ways = {"stored": partial(tokens, model, count), "decoded": partial(decoded, tokens, model, count)}
    times = take_turns({way: lambda _turn, run=run: run() for way, run in ways.items()}, seconds)
    for way, time in times.items():
        print(
            f"{way}: {count / time.median:.1f} tokens/s ({count / time.high:.1f} to {count / time.low:.1f})"
        )


if __name__ == "__main__":
    main()
