"""A convolutional network of one's own at 2 bits: train, pack, fold its norms, and fuse its calls.

python examples/vision_net.py --out vision-2bit

The images are made here: 16 x 16 pixels of noise with a stripe, which lies, stands or leans.
Bring your own by changing `images`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bellbox as bb


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """fp32 `[count, 1, 16, 16]` and their classes `[count]`: 0 lies, 1 stands, 2 leans."""
    draws = torch.Generator().manual_seed(seed)
    pixels = 0.5 * torch.randn(count, 1, 16, 16, generator=draws)
    classes = torch.randint(3, (count,), generator=draws)
    places = torch.randint(4, 12, (count,), generator=draws)
    for image, kind, place in zip(pixels, classes.tolist(), places.tolist(), strict=True):
        if kind == 0:
            image[0, place] += 1
        elif kind == 1:
            image[0, :, place] += 1
        else:
            image[0].diagonal(place - 8).add_(1)
    return pixels, classes


def network() -> nn.Module:
    """The stem and the classifier stay in full precision by themselves; what is between becomes low-bit."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)),
    )


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, classes: Tensor) -> float:
    """Share of images whose class is the likeliest."""
    return float((model.eval()(pixels).argmax(1) == classes).float().mean())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; the accuracies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the packed model goes")
    parser.add_argument("--steps", type=int, default=120)
    choices = parser.parse_args(arguments)

    torch.manual_seed(0)
    pixels, classes = images(2048, seed=0)
    held_out = images(512, seed=1)
    model = bb.prepare(network(), bb.Recipe.bbq_vision(bits=2))
    print(bb.summary(model))
    optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model, lr=3e-3, weight_decay=0.01))
    for step in range(choices.steps):
        chosen = torch.arange(step * 64, step * 64 + 64) % len(pixels)
        loss = F.cross_entropy(model.train()(pixels[chosen]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    packed = bb.convert(model.eval())
    bb.save(packed, choices.out)
    again = bb.load(choices.out, into=network())
    found: dict[str, Any] = {"equal": torch.equal(again(held_out[0]), model(held_out[0]))}
    found["trained"] = accuracy(model, *held_out)
    # For speed: norms go into the convolutions' scales, the ReLU into their calls. Equal on paper, not in every bit.
    fast = bb.fuse_convolutions(bb.fold_batch_norms(again))
    found["folded and fused"] = accuracy(fast, *held_out)
    print(found)
    return found


if __name__ == "__main__":
    main()
