"""A quantization method of one's own in one file, trained, packed and loaded without it.

    python examples/own_method.py --out packed
    bellbox train --import own_method --quantization.method midpoint      # from this folder

`midpoint` cuts a Gaussian where its levels' midpoints are: evenly, between -2 and 2 sigma.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.core.grid import Levels
from bellbox.quantizers import Quantizer
from bellbox.quantizers.base import Normaliser
from bellbox.quantizers.straight_through import ClipRange, straight_through


@dataclass(frozen=True)
class MidpointOptions:
    """What a recipe may say of it: `options={"reach": 3.0}`."""

    reach: float = 2.0
    """Levels lie within so many sigma, and the gradient passes there."""


class Midpoint(Quantizer):
    """Even levels within a fixed multiple of each row's RMS."""

    method = "midpoint"
    Options = MidpointOptions
    own_block = 128
    measured = "rms"
    rescale = True

    def step(self, n: int) -> float:
        """The distance of two levels, in sigma."""
        return 2 * self.options.reach / n

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """n half-integer levels; a threshold in the middle between two."""
        return Levels(
            n,
            -0.5 if zero_point is None else zero_point,
            tuple((i - n / 2) * self.step(n) for i in range(1, n)),
        )

    def scale(self) -> Tensor:
        """What one level is worth, in sigma."""
        return torch.tensor(self.step(self.levels.n))

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """Straight through within the reach, nothing beyond."""
        reach = self.options.reach
        assert norm.sigma is not None
        unit = norm.sigma * float(self.scale())
        return straight_through(rows, norm, unit, self.levels, self.block, dtype, ClipRange(-reach, reach))


def network() -> nn.Module:
    """64 numbers in, 8 out."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; the losses, and whether the packed model is the trained one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the packed model goes")
    parser.add_argument("--steps", type=int, default=100)
    choices = parser.parse_args(arguments)

    torch.manual_seed(0)
    x = torch.randn(256, 64)
    y = torch.sin(x @ torch.randn(64, 8) / 8)
    model = bb.prepare(network(), bb.Recipe.of("midpoint", bits=2, options={"reach": 1.8}))
    optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model, lr=3e-3))
    losses = []
    for _ in range(choices.steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    bb.save(bb.convert(model.eval()), choices.out)
    packed = bb.load(choices.out, into=network())  # integers: this needs no `midpoint` any more
    found = {"first": losses[0], "last": losses[-1], "equal": torch.equal(packed(x), model(x))}
    print(found)
    return found


if __name__ == "__main__":
    main()
