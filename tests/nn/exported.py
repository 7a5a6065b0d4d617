"""Run what test_export.py wrote, in a process of its own beside another packed model that was made first."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from torch import nn

import bellbox as bb
from bellbox.nn.binarized_linear import BinarizedLinear


class Net(nn.Module):
    """Convolutions over images and lines, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 5)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.last: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, 16, 6, 5]` to `[batch, 5]`."""
        return self.last(self.linear(self.line(self.conv(x).flatten(2)).mean(2)))


def images() -> torch.Tensor:
    """The same in every process."""
    return torch.linspace(-1, 1, 3 * 16 * 30).reshape(3, 16, 6, 5).sin()


def packed(seed: int) -> nn.Module:
    """A packed model."""
    torch.manual_seed(seed)
    model = bb.prepare(Net(), bb.Recipe.bbq(bits=2))
    model(torch.randn(8, 16, 6, 5))
    model = bb.convert(model.eval())
    model.last = binarized()
    return model


def binarized() -> BinarizedLinear:
    """Random signs, bits and scales, inputs of 8 bits."""
    layer = BinarizedLinear(5, 4, True, 3, True, 8)
    state = {name: torch.randint(0, 256, t.shape, dtype=torch.uint8) for name, t in layer.stored().items()}
    state |= {"scales": torch.randn(4, 2, 7).half(), "bias": torch.randn(4)}
    layer.load_state_dict(state)
    return layer.requires_grad_(False)


def main(folder: Path) -> None:
    """Print the outputs that are not those saved."""
    other, x = packed(2), images()
    y = torch.load(folder / "y.pt")
    assert not torch.equal(other(x), y)
    forms = {
        "export": lambda: torch.export.load(folder / "m.pt2").module(),
        "jit": lambda: torch.jit.load(folder / "m.jit"),
        "pickle": lambda: torch.load(io.BytesIO((folder / "m.pkl").read_bytes()), weights_only=False),
        "state": lambda: _filled(other, folder / "state.pt"),
    }
    with torch.no_grad():
        for name, load in forms.items():
            model = load()
            print(name, torch.equal(model(x), y))


def _filled(other: nn.Module, path: Path) -> nn.Module:
    other.load_state_dict(torch.load(path))
    return other


if __name__ == "__main__":
    main(Path(sys.argv[1]))
