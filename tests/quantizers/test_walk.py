"""The method that docs/walk-a-method.md adds is the one of the formula that the page gives."""

from __future__ import annotations

import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bellbox.quantizers import METHODS, QuantizerSpec, build_quantizer

PAGE = Path(__file__).parents[2] / "docs" / "walk-a-method.md"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(METHODS, "sigma", METHODS["rtn"])  # registers itself; taken out again afterwards
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("n", [2, 3, 4, 16])
def test_the_page_adds_the_method_of_its_formula(
    blocks: list[str], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    method, formula, _ = blocks
    found: dict[str, Any] = {
        "Tensor": Tensor,
        "half_up": lambda x: torch.floor(x + 0.5),
        "Expected": lambda value, gradient, _: (value, gradient),
    }
    exec(compile(formula, str(PAGE), "exec"), found)
    module = types.ModuleType("walk")
    monkeypatch.setitem(sys.modules, "walk", module)  # where a dataclass looks for its annotations
    exec(compile(method, str(PAGE), "exec"), vars(module))
    quantizer = build_quantizer(QuantizerSpec("sigma", n, options={"reach": 1.5}), 64, 6, "here").double()
    x = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).requires_grad_()
    g = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    out = quantizer(x)
    (out * g).sum().backward()
    value, gradient = found["sigma"](x.detach(), g, n, 1.5)
    torch.testing.assert_close(out.detach(), value, rtol=0, atol=1e-6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient, rtol=1e-6, atol=1e-6)
    assert 0 < int((gradient == 0).sum()) < math.prod(x.shape)
