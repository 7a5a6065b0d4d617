from __future__ import annotations

import pytest
import torch

from bellbox.ops.encode import CHUNK_ELEMENTS
from bellbox.ops.learned_thresholds import learned_backward, learned_forward


def test_a_value_on_a_threshold_goes_up():
    thresholds = torch.tensor([-0.25, 0.5, 2.0])
    x = torch.tensor([[-0.5, -0.25, 0.5, 0.0, 2.0, 3.0, float("nan")]])
    x_hat, v = learned_forward(x, torch.ones(1, 1), torch.full((1, 1), 2.0), thresholds, torch.float32)
    assert x_hat[0, :6].tolist() == [-3, -1, 1, -1, 3, 3]
    assert torch.equal(v.nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_is_that_of_the_piecewise_linear_function(dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (3, CHUNK_ELEMENTS // 2 + 3)  # more than one chunk
    grad, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    edges, slopes = (
        torch.tensor([-1.0, 0.25, 0.5, 1.5], dtype=wide),
        torch.tensor([0.5, 3.0, 2.0], dtype=wide),
    )
    g_v, (sums, into) = learned_backward(grad, v, edges, slopes)
    u, expected = v.double(), torch.zeros(shape, dtype=torch.float64)
    for i, slope in enumerate(slopes.tolist()):
        mine = grad.double() * slope * ((u > edges[i]) & (u <= edges[i + 1]))
        expected += mine
        torch.testing.assert_close(sums[i], mine.sum(), rtol=1e-3, atol=0.1)
        torch.testing.assert_close(into[i], (mine * (u - edges[i])).sum(), rtol=1e-3, atol=0.1)
    bound = 0.01 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(g_v.double(), expected, rtol=bound, atol=bound)
