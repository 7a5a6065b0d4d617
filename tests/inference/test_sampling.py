"""What is drawn, against the plain definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.inference.sampling import (
    Sampling,
    finite_rows,
    generator_for,
    probabilities,
    require_finite,
    sample,
    sample_each,
)


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
    assert torch.allclose(
        probabilities(logits, Sampling(1, 0.7, top_k, top_p)), expected, rtol=1e-9, atol=1e-14
    )


def test_draws_follow_the_probabilities_and_never_leave_them() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -800.0, 2.0, -torch.inf]])
    generator = generator_for(0)
    drawn = torch.cat([sample(logits, Sampling(1), generator) for _ in range(6000)])
    shares = torch.bincount(drawn, minlength=6) / 6000
    assert shares[[1, 3, 5]].tolist() == [0, 0, 0]
    assert torch.allclose(shares.double(), probabilities(logits, Sampling(1))[0], atol=0.03)


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("settings", [(None, None), (3, None), (None, 0.9), (3, 0.9)])
def test_the_ends_of_what_can_be_drawn(monkeypatch: pytest.MonkeyPatch, drawn: float, settings: Any) -> None:
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), drawn, dtype=torch.float64))
    sampling, generator = Sampling(1, 0.9, *settings), generator_for(0)
    for logits in (torch.randn(1, 1000), torch.tensor([[-1e30, 5.0, 5.0, -1e30]]), torch.full((1, 3), 1e-3)):
        token = int(sample(logits, sampling, generator)[0])
        assert probabilities(logits, sampling)[0, token] > 0


def test_any_temperature() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.999]])
    for temperature in (0.0, 1e-320, 1e-30, 1e-5):
        assert int(sample(logits, Sampling(1, temperature), generator_for(0))) == 0
    assert probabilities(logits, Sampling(1, 1e300))[0].tolist() == pytest.approx([1 / 3] * 3)


def test_what_is_not_finite() -> None:
    require_finite(torch.tensor([3e38, 3e38, -3e38]), 1)  # though their sum is
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(BellboxError, match="new token 7 are not finite"):
            require_finite(torch.tensor([0.0, wrong, 1.0]), 7)
    with pytest.raises(BellboxError, match="not finite"):
        require_finite(torch.tensor([torch.inf, -torch.inf]), 1)
    with pytest.raises(BellboxError, match="64 bits"):
        generator_for(2**64)


def test_rows_are_drawn_together_as_alone() -> None:
    ways = [
        Sampling(1),
        Sampling(1, 0.0),
        Sampling(1, 0.7, 5),
        Sampling(1, 1.3, None, 0.8),
        Sampling(1, 0.5, 40, 0.5),
    ]
    logits = 2 * torch.randn(len(ways), 301, generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        alone = [sample(logits[i : i + 1], each, generator_for(seed)) for i, each in enumerate(ways)]
        together = sample_each(logits, ways, [generator_for(seed) for _ in ways])
        assert together == torch.cat(alone).tolist()


def test_the_likeliest_needs_no_draw() -> None:
    generator = generator_for(3)
    before = generator.get_state()
    assert sample_each(torch.tensor([[0.0, 2.0, 2.0]]), [Sampling(1, 0.0)], [generator]) == [1]
    assert torch.equal(generator.get_state(), before)


def test_which_rows_are_finite() -> None:
    rows = torch.tensor(
        [[3e38, 3e38], [1.0, torch.nan], [0.0, -1.0], [-torch.inf, 0.0], [torch.inf, -torch.inf]]
    )
    assert finite_rows(rows) == [True, False, True, False, False]
    assert finite_rows(rows[2:3]) == [True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0,), "max_new_tokens is 0"),
        ((1, -0.1), "temperature is -0.1"),
        ((1, float("nan")), "temperature is nan"),
        ((1, 1.0, 0), "top_k is 0"),
        ((1, 1.0, None, 0.0), "top_p is 0.0"),
        ((1, 1.0, None, 1.5), "top_p is 1.5"),
    ],
)
def test_settings_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises(BellboxError, match=message):
        Sampling(*settings)
