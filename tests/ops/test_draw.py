"""Tokens drawn from logits: the same ones on every path, in proportion to the exponential."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops import native
from bellbox.ops.draw import draw, operation, weights_of

SETS = native.instruction_sets()
TEMPERATURES, TOP_KS, TOP_PS = (1.0, 0.0, 0.3, 1e-320, 1e300), (0, 1, 7, 10_000), (1.0, 0.9, 0.2, 1e-300)


@pytest.fixture(params=SETS or ["none"])
def isa(request):
    if not SETS:
        pytest.skip("the compiled kernels were not built")
    with native.use(request.param):
        yield request.param


def settings_of(rows: list[tuple[float, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
    temperature, top_k, top_p = zip(*rows, strict=True)
    numbers = [torch.tensor(each, dtype=torch.float64) for each in (temperature, top_p)]
    return numbers[0], torch.tensor(top_k), numbers[1]


def logits_of(rows: int, vocabulary: int, scale: float) -> Tensor:
    """With ties, both zeros, and tokens that cannot come."""
    logits = scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[:, ::5] = (logits[:, ::5] * 4).round() / 4
    logits[:, 1::7] *= -0.0
    logits[::2, 3::11] = -torch.inf
    return logits


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17, 600, 5003])
@pytest.mark.parametrize("scale", [0.02, 2.0, 30.0])
def test_the_same_tokens_on_every_path(isa, vocabulary, scale):
    ways = list(itertools.product(TEMPERATURES, TOP_KS, TOP_PS))
    settings, logits = settings_of(ways), logits_of(len(ways), vocabulary, scale)
    draws = torch.Generator().manual_seed(0)
    for share in (0.0, None, None, 1 - 2**-53):
        drawn = torch.rand(len(ways), dtype=torch.float64, generator=draws) if share is None else torch.full(
            (len(ways),), share, dtype=torch.float64
        )  # fmt: skip
        found = draw(logits, *settings, drawn)
        assert torch.equal(found, operation.reference(logits, *settings, drawn))
        alone = [
            draw(logits[i : i + 1], *(s[i : i + 1] for s in settings), drawn[i : i + 1])
            for i in range(0, len(ways), 9)
        ]
        assert torch.equal(found[::9], torch.cat(alone))
        one = settings[0] > 0
        weights = weights_of(logits[one], *(s[one] for s in settings))
        assert (weights.gather(-1, found[one][:, None]) > 0).all()


def test_weights_are_exponentials() -> None:
    logits = 10 * torch.randn(2, 999)
    weights = weights_of(logits, *settings_of([(0.7, 0, 1.0), (3.0, 0, 1.0)])).double()
    expected = (logits.double() / torch.tensor([[0.7], [3.0]], dtype=torch.float64)).softmax(dim=-1)
    found = weights / weights.sum(dim=-1, keepdim=True)
    assert torch.allclose(found, expected, rtol=1e-14, atol=1e-14)


def test_the_first_of_equal_ones_is_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0]])
    for top_k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4])):
        weights = weights_of(logits, *settings_of([(1.0, top_k, 1.0)]))
        assert weights[0].nonzero()[:, 0].tolist() == kept


def test_rows_without_numbers_to_draw_by(isa):
    logits = torch.zeros(5, 40)
    logits[0, 39], logits[1, 0], logits[2], logits[3, 7] = torch.nan, torch.inf, -torch.inf, -torch.nan
    settings = settings_of([(1.0, 0, 1.0)] * 5)
    drawn = torch.full((5,), 0.5, dtype=torch.float64)
    assert draw(logits, *settings, drawn).tolist() == [-1, -1, -1, -1, 20]
    assert operation.reference(logits, *settings, drawn).tolist() == [-1, -1, -1, -1, 20]


@pytest.mark.parametrize(
    "spoilt",
    [
        (-1.0, 0, 1.0),
        (float("inf"), 0, 1.0),
        (float("nan"), 0, 1.0),
        (1.0, -1, 1.0),
        (1.0, 0, 0.0),
        (1.0, 0, 1.1),
    ],
)
def test_settings_out_of_range(spoilt):
    drawn = torch.zeros(1, dtype=torch.float64)
    for call in (draw, operation.reference):
        with pytest.raises(BellboxError, match="out of range"):
            call(torch.zeros(1, 3), *settings_of([spoilt]), drawn)
        with pytest.raises(BellboxError, match="out of range"):
            call(torch.zeros(1, 3), *settings_of([(1.0, 0, 1.0)]), drawn + 1)
