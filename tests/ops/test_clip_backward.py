from __future__ import annotations

import pytest
import torch

from bellbox.ops.clip_backward import clip_backward
from bellbox.ops.encode import CHUNK_ELEMENTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_ends_of_the_window_belong_to_it(dtype):
    v = torch.tensor([[-1.5, -1.515625, 0.25, 0.0, 1.25, 1.2578125, float("nan")]], dtype=dtype)
    grad = torch.arange(1.0, 8.0).to(dtype)[None]
    passed, _ = clip_backward(grad, v, None, -1.5, 1.25)
    assert passed[0, :6].tolist() == [1, 0, 3, 4, 5, 0]
    assert passed.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_rows_over_several_chunks(dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (5, CHUNK_ELEMENTS // 2 + 3)
    grad, v, x_hat = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    passed, sums = clip_backward(grad, v, x_hat, -0.7, 1.1)
    wide_grad, wide_v = grad.double(), v.double()
    within = (wide_v >= -0.7) & (wide_v <= 1.1)
    assert torch.equal(passed, torch.where(within, grad, 0))
    expected = torch.stack(
        (
            (wide_grad * x_hat.double()).sum(-1),
            (wide_grad * within * wide_v).sum(-1),
            (wide_grad * ~within * wide_v.sign()).sum(-1),
        ),
        -1,
    )
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-2)
