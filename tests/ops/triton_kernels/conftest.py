"""The Triton backend in Triton's interpreter, on CPU tensors: nothing here needs a GPU.

The folder is not called `triton`: beside test modules that name would hide that Triton is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bellbox.ops.backends.triton import availability

ASKED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process began so: Triton's own functions become the interpreter's when it is first imported."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call goes to Triton's kernels, or is refused by name."""
    if not availability.installed():
        pytest.skip("Triton is not installed (pip install 'bellbox[triton]')")
    if not ASKED:
        pytest.skip(
            "these run by themselves: TRITON_INTERPRET=1 pytest tests/ops/triton_kernels (`make unit` does)"
        )
    monkeypatch.setenv("BELLBOX_BACKEND", "triton")


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """New tensors lie between bytes of 0xA5; the function counts tensors, and fails where such a byte was written."""
    made: list[tuple[Tensor, int]] = []
    empty, new_empty, margin = torch.empty, Tensor.new_empty, 64

    def guarded(
        *shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32, device: object = "cpu"
    ) -> Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(sizes).numel() * dtype.itemsize  # pyright: ignore[reportArgumentType]
        whole = empty(count + 2 * margin, dtype=torch.uint8).fill_(0xA5)
        made.append((whole, count))
        return whole[margin : margin + count].view(dtype).view(sizes)  # pyright: ignore[reportArgumentType]

    def beside(
        self: Tensor, *shape: int | tuple[int, ...], dtype: torch.dtype | None = None, **of: object
    ) -> Tensor:
        if of:  # the interpreter's own
            return new_empty(self, *shape, dtype=dtype or self.dtype, **of)
        return guarded(*shape, dtype=dtype or self.dtype)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(Tensor, "new_empty", beside)

    def intact() -> int:
        for whole, count in made:
            outside = torch.cat((whole[:margin], whole[margin + count :]))
            assert bool((outside == 0xA5).all()), f"written beside a tensor of {count} bytes"
        return len(made)

    return intact
