"""A step of the hyperball, its projection by sorting included, reads no number back: a GPU is not waited for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bellbox as bb

WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")


class Seen(TorchDispatchMode):
    """Names of the operations that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_neither_the_norm_nor_the_sort_waits_for_the_device() -> None:
    torch.manual_seed(0)
    model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(bits=2))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)  # Adam counts its steps on the CPU
    optimizer = bb.optim.hyperball(plain, model, lr=0.02, every=2)
    for step in range(4):
        model(torch.randn(4, 64)).square().mean().backward()
        with Seen() as seen:
            optimizer.step()
        if step:  # the first one looks at what it was given
            assert ("sort" in seen.names) == (step % 2 == 1)
            assert not [name for name in seen.names if name.startswith(WAIT)]
        optimizer.zero_grad()
    with Seen() as seen:
        torch.ones(1).item()
    assert [name for name in seen.names if name.startswith(WAIT)]
