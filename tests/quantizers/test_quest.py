from __future__ import annotations

import pytest
import torch

from bellbox.quantizers import build_quantizer
from bellbox.quantizers.quest import CLIPS, gaussian_clip, gaussian_error
from bellbox.recipe import QuantizerSpec


@pytest.mark.parametrize("n", list(CLIPS))
def test_the_authors_clips_are_those_of_least_squared_error(n):
    tried = {gaussian_error(n, CLIPS[n] * (1 + 0.001 * k)): k for k in range(-30, 31)}
    assert gaussian_error(n, CLIPS[n]) <= min(tried) * (1 + 1e-6 if n <= 32 else 1 + 0.01)
    if n <= 32:  # beyond, theirs is a little inside the best one
        assert abs(tried[min(tried)]) <= 1


def test_any_other_number_of_levels_gets_its_own():
    assert gaussian_clip(4) < gaussian_clip(5) < gaussian_clip(6) < gaussian_clip(8)
    assert gaussian_error(255, gaussian_clip(255)) < gaussian_error(64, gaussian_clip(64)) / 10


@pytest.mark.parametrize("zero_point", [-0.5, 0.0, 1.0])
def test_trust_is_half_a_step_around_the_levels_wherever_they_lie(zero_point):
    q = build_quantizer(QuantizerSpec("quest", 4, zero_point, block=1), 64, None, "")
    x = torch.randn(
        50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    x_hat = q(x)
    x_hat.sum().backward()
    half = x.detach().square().mean(-1, keepdim=True).sqrt() * CLIPS[4] / 3
    assert x.grad is not None
    assert torch.equal(x.grad != 0, (x_hat - x).abs() <= half)


@pytest.mark.parametrize("n", [5, 7, 9, 15, 17, 31, 33, 63, 65, 255])
def test_a_clip_beside_those_of_the_table_has_the_least_squared_error(n):
    clip = gaussian_clip(n)
    error = gaussian_error(n, clip)
    assert error < gaussian_error(n, clip * 1.001)
    assert error < gaussian_error(n, clip * 0.999)
