"""Images a second of whole ResNets, packed and in torch's bf16 and fp32, in turns, and the size of the low-bit layers.

OMP_NUM_THREADS=1 python benchmarks/vision.py                 # batch 16, one thread, 2 bits
OMP_NUM_THREADS=1 python benchmarks/vision.py --bits 1 --seconds 20
OMP_NUM_THREADS=1 python benchmarks/vision.py --layers        # single 3 x 3 convolutions

Torch runs channels last, without gradients; bf16 with the whole model in bf16. The packed model's batch norms are as
`convert` leaves them, once more folded (`fold_batch_norms`), and then with sums and ReLUs in the convolutions' calls
(`fuse_convolutions`).
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from torch import nn

import bellbox as bb
from bellbox.benchmark.timing import take_turns
from bellbox.formats.packed import sizes
from bellbox.models import build, vision_preset

MODELS = {
    "resnet-small": ("resnet-small", {}),
    "resnet-20": ("resnet-20", {}),
    "ResNet-18, 32 x 32": ("resnet-small", {"width": 64, "stages": 4, "blocks": 2, "stem_stride": 1}),
}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--bits", type=int, default=2)
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--seconds", type=float, default=10.0)
    flags.add_argument("--layers", action="store_true")
    asked = flags.parse_args()
    torch.set_num_threads(1)
    if asked.layers:
        for channels, size in ((32, 16), (64, 32), (64, 8), (128, 16), (256, 8), (512, 4)):
            one_layer(channels, size, asked)
        return
    for name, (preset, overrides) in MODELS.items():
        compare(name, build(vision_preset(preset, **overrides), seed=0), asked)


def compare(name: str, plain: nn.Module, asked: argparse.Namespace) -> None:
    x = torch.rand(asked.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    trained = bb.prepare(copy.deepcopy(plain), bb.Recipe.bbq(asked.bits))
    trained(x)
    packed = bb.convert(trained.eval())
    plain = plain.eval().to(memory_format=torch.channels_last)
    half = copy.deepcopy(plain).bfloat16()
    folded = bb.fold_batch_norms(copy.deepcopy(packed))
    ways = {
        "torch fp32": partial(plain, x),
        "torch bf16": partial(half, x.bfloat16()),
        "packed": partial(packed, x),
        "packed, norms folded": partial(folded, x),
        "folded and fused": partial(bb.fuse_convolutions(folded), x),
    }
    with torch.no_grad():
        times = take_turns({way: lambda _turn, run=run: run() for way, run in ways.items()}, asked.seconds)
    counted = sizes(packed)
    print(f"{name}: {asked.bits} bits, batch {asked.batch}; low-bit layers 1/{counted.ratio:.2f} of bf16")
    best = min(times["torch fp32"].median, times["torch bf16"].median)
    for way, time in times.items():
        print(
            f"  {way:<22}{asked.batch / time.median:>9,.0f} images/s  {best / time.median:5.2f} x the better torch  "
            f"({time.median * 1e3:.2f} ms, quartiles {time.low * 1e3:.2f} to {time.high * 1e3:.2f})"
        )


def one_layer(channels: int, size: int, asked: argparse.Namespace) -> None:
    x = torch.randn(asked.batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    trained = bb.prepare(copy.deepcopy(plain), bb.Recipe.bbq(asked.bits))
    trained(x)
    packed = bb.convert(trained.eval())
    half = plain.bfloat16().to(memory_format=torch.channels_last)
    ways = {"bf16": partial(half, x.bfloat16()), "packed": partial(packed, x)}
    with torch.no_grad():
        times = take_turns(
            {way: lambda _turn, run=run: run() for way, run in ways.items()}, asked.seconds / 6
        )
    bf16, low = times["bf16"], times["packed"]
    print(
        f"{channels} channels, {size} x {size}: bf16 {bf16.median * 1e3:.2f} ms, packed {low.median * 1e3:.2f} ms "
        f"({low.low * 1e3:.2f} to {low.high * 1e3:.2f}): {bf16.median / low.median:.2f} x"
    )


if __name__ == "__main__":
    main()
