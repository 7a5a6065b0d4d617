"""What is drawn, against the plain definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.inference.sampling import generator_for, probabilities, require_finite, sample


def defined(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """All sorted, then cut."""
    order = logits.double().argsort(dim=-1, descending=True, stable=True)
    result = (logits.double() / temperature).gather(-1, order)
    if top_k is not None:
        result[:, top_k:] = -torch.inf
    result = result.softmax(dim=-1)
    if top_p is not None:
        result = result.masked_fill(result.cumsum(dim=-1) - result >= top_p, 0.0)
        result = result / result.sum(dim=-1, keepdim=True)
    return torch.zeros_like(result).scatter(-1, order, result)


@pytest.mark.parametrize("vocabulary", [7, 600, 5000])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # many likely tokens, and few
@pytest.mark.parametrize("top_k", [None, 1, 40, 1000, 10_000])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9, 1.0])
def test_probabilities_are_the_defined_ones(vocabulary: int, scale: float, top_k: Any, top_p: Any) -> None:
    logits = scale * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    expected = defined(logits, 0.7, top_k, top_p)
    assert torch.allclose(probabilities(logits, 0.7, top_k, top_p), expected, rtol=1e-9, atol=1e-14)


def test_draws_follow_the_probabilities_and_never_leave_them() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -800.0, 2.0, -torch.inf]])
    generator = generator_for(0)
    drawn = torch.cat([sample(logits, 1.0, None, None, generator) for _ in range(6000)])
    shares = torch.bincount(drawn, minlength=6) / 6000
    assert shares[[1, 3, 5]].tolist() == [0, 0, 0]
    assert torch.allclose(shares.double(), probabilities(logits, 1.0, None, None)[0], atol=0.03)


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("settings", [(None, None), (3, None), (None, 0.9), (3, 0.9)])
def test_the_ends_of_what_can_be_drawn(monkeypatch: pytest.MonkeyPatch, drawn: float, settings: Any) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, drawn, dtype=torch.float64))
    for logits in (torch.randn(1, 1000), torch.tensor([[-1e30, 5.0, 5.0, -1e30]]), torch.full((1, 3), 1e-3)):
        token = int(sample(logits, 0.9, *settings)[0])
        assert probabilities(logits, 0.9, *settings)[0, token] > 0


def test_any_temperature() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.999]])
    for temperature in (0.0, 1e-320, 1e-30, 1e-5):
        assert int(sample(logits, temperature, None, None)) == 0
    assert probabilities(logits, 1e300, None, None)[0].tolist() == pytest.approx([1 / 3] * 3)


def test_what_is_not_finite() -> None:
    require_finite(torch.tensor([3e38, 3e38, -3e38]), 1)  # though their sum is
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(BellboxError, match="new token 7 are not finite"):
            require_finite(torch.tensor([0.0, wrong, 1.0]), 7)
    with pytest.raises(BellboxError, match="not finite"):
        require_finite(torch.tensor([torch.inf, -torch.inf]), 1)
    with pytest.raises(BellboxError, match="64 bits"):
        generator_for(2**64)
