"""A network and a loop of one's own at 2 bits: prepare, train, convert, save, load.

python examples/plain_loop.py --out model-2bit
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import bellbox as bb


def network() -> nn.Module:
    """64 numbers in, 8 out."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run it; the losses before and after, and whether the packed model is the trained one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the packed model goes")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    choices = parser.parse_args(arguments)

    torch.manual_seed(0)
    x = torch.randn(512, 64)
    y = torch.sin(x @ torch.randn(64, 8) / 8)

    # All three layers become low-bit: a stack as short as this does not show its ends. keep= names layers to leave.
    model = bb.prepare(network(), bb.Recipe.bbq(bits=choices.bits))
    bb.calibrate(model, [x])
    optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model, lr=3e-3, weight_decay=0.01))
    losses = []
    for _ in range(choices.steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    bb.save(bb.convert(model.eval()), choices.out)
    packed = bb.load(choices.out, into=network())
    equal = torch.equal(packed(x), model(x))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; packed equals trained: {equal}")
    return {"first": losses[0], "last": losses[-1], "equal": float(equal)}


if __name__ == "__main__":
    main()
