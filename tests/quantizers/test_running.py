"""Running scales that move once a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.quantizers.bbq import EMA_DECAY
from bellbox.quantizers.running import running_scales_once


def prepared() -> nn.Sequential:
    torch.manual_seed(0)
    return bb.prepare(nn.Sequential(nn.Linear(16, 8)), bb.Recipe.bbq(bits=2, granularity="ema"))


def running(model: nn.Sequential) -> torch.Tensor:
    return model[0].activation_quantizer.quantizer.r_ema  # pyright: ignore[reportAttributeAccessIssue, reportReturnType, reportOptionalMemberAccess]


def test_a_step_moves_once_by_the_mean_of_its_micro_batches() -> None:
    model, first, second = prepared(), torch.randn(5, 16), 3 * torch.randn(5, 16)
    model(first)  # sets it
    before = float(running(model))
    with running_scales_once(model):
        model(first)
        model(second)
        model(second)  # as where a block runs again for its backward
        model(first)
        assert float(running(model)) == before
    square = (first.double().square().mean() + second.double().square().mean()) / 2
    wanted = EMA_DECAY * before + (1 - EMA_DECAY) * float(square.rsqrt())
    assert float(running(model)) == pytest.approx(wanted, rel=1e-6)


def test_what_is_not_finite_says_nothing_and_an_exception_moves_nothing() -> None:
    model, x = prepared(), torch.randn(5, 16)
    model(x)
    before = float(running(model))
    with running_scales_once(model):
        model(x)
        model(torch.full((5, 16), torch.nan))
    assert float(running(model)) == pytest.approx(before, rel=1e-6)

    def broken() -> None:
        with running_scales_once(model):
            model(100 * x)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert float(running(model)) == pytest.approx(before, rel=1e-6)
    model(100 * x)  # alone, it moves at once
    assert float(running(model)) < 0.995 * before
