from __future__ import annotations

import pytest
import torch

from bellbox.core.hadamard import butterfly
from bellbox.ops.rotate import reference_rotate, rotate, rotation


@pytest.mark.parametrize("shape", [(16,), (5, 48), (2, 3, 160), (0, 32)])
def test_the_operation_keeps_its_registered_contract(shape):
    x = torch.randn(shape)
    torch.library.opcheck(rotate.call, (x, 0.25, 16, torch.float32))
    torch.library.opcheck(rotate.call, (x.bfloat16(), 0.25, 16, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_the_compiled_kernels_do_not_take_runs_on_the_reference(dtype):
    x = torch.randn(7, 96).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (butterfly(x.to(wide), 32) * 32**-0.5).to(dtype)
    assert torch.equal(rotate(x, 32**-0.5, 32, dtype), expected)
    assert torch.equal(reference_rotate(x, 32**-0.5, 32, dtype), expected)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("run", [rotate, reference_rotate])
def test_each_run_of_a_block_is_multiplied_with_the_matrix_of_hadamard(run, block):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = torch.randn(3, 2, 32)
    expected = 0.3 * (x.double().unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    torch.testing.assert_close(run(x, 0.3, block, torch.float64), expected, rtol=1e-5, atol=1e-5)


def test_its_gradient_is_itself():
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotation(t, 8**-0.5, 8, torch.float64), x)
    assert torch.autograd.gradgradcheck(lambda t: rotation(t, 8**-0.5, 8, torch.float64), x)
    low = torch.randn(3, 64).bfloat16().requires_grad_()
    rotation(low, 8**-0.5, 8, torch.float32).sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


def test_a_view_with_gaps_is_rotated_like_its_copy():
    x = torch.randn(6, 64)[:, ::2]
    assert torch.equal(rotate(x, 1.0, 32, torch.float32), butterfly(x.contiguous(), 32))


def test_samples_of_any_shape_are_batched():
    for shape in ((3, 64), (3, 2, 64)):
        x = torch.randn(shape)
        batched = torch.func.vmap(lambda t: rotation(t, 1.0, 32, torch.float32), in_dims=-2)(x)
        assert torch.equal(batched, rotation(x.movedim(-2, 0), 1.0, 32, torch.float32))
