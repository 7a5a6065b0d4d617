"""A 2-bit network under Lightning Fabric: what `prepare` returns is a module like any other.

python examples/fabric.py --devices 2
"""

from __future__ import annotations

import argparse

import torch
from lightning_fabric import Fabric
from torch import nn

import bellbox as bb


def train(fabric: Fabric, steps: int) -> float:
    torch.manual_seed(0)
    model = bb.prepare(
        nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), bb.Recipe.bbq(bits=2)
    )
    optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model, lr=1e-2, weight_decay=0.01))
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1 + fabric.global_rank))
    bb.calibrate(model, [x])  # in all processes, so that their scales are equal
    network, optimizer = fabric.setup(model, optimizer)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (network(x) - x.roll(1, 1)).square().mean()
        fabric.backward(loss)
        optimizer.step()
    return float(fabric.all_reduce(loss.detach(), reduce_op="mean"))


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--devices", type=int, default=2)
    flags.add_argument("--steps", type=int, default=50)
    options = flags.parse_args()
    lightning = Fabric(accelerator="cpu", devices=options.devices, strategy="ddp")
    lightning.launch()
    first, last = train(lightning, 1), train(lightning, options.steps)
    lightning.print(f"loss {first:.3f} after one step, {last:.3f} after {options.steps}")
