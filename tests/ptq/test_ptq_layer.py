from __future__ import annotations

import copy

import pytest
import torch

from bellbox.nn.binarized_linear import BinarizedLinear, round_activations
from bellbox.ops import binarized_linear as binarized
from bellbox.ops import native
from bellbox.ptq.feedback import binarize_matrix
from bellbox.ptq.hessian import inverse_factor

SETS = [name for name in native.instruction_sets() if name in binarized.MAX_ROWS]
on_each_set = pytest.mark.parametrize(
    "isa", SETS or [pytest.param("", marks=pytest.mark.skip(reason="no instruction set for the kernel"))]
)


def layer(rows: int = 50, columns: int = 200, block: int = 64, bias: bool = True) -> BinarizedLinear:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, columns, generator=g), torch.randn(2 * columns, columns, generator=g)
    blocks, _ = binarize_matrix(weight, inverse_factor(x.T @ x, 0.01, "x"), block=block)
    made = BinarizedLinear.from_blocks(blocks, torch.randn(rows, generator=g) if bias else None, block)
    made.activation_bits = 8
    return made


@on_each_set
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [8, 6])
def test_few_rows_without_decoding_agree_with_decoded_weights(bias, bits, isa):
    one, x = layer(bias=bias), torch.randn(2, 3, 200)
    one.activation_bits = bits
    with native.use(isa):
        found = one(x)
    assert one._decoded is None
    wanted = round_activations(x, bits) @ one.weight().T + (0 if one.bias is None else one.bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(
        one(torch.cat([x] * 16))[:2], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
    )  # many rows: decoded


@on_each_set
def test_what_was_made_follows_what_is_stored(isa):
    one, x = layer(), torch.randn(1, 200)
    with native.use(isa), torch.no_grad():
        first, twin = one(x), copy.deepcopy(one)
        one.scales.mul_(2)
        torch.testing.assert_close(one(x) - one.bias, 2 * (first - one.bias), rtol=1e-4, atol=1e-4)
        one.bias.add_(1)
        torch.testing.assert_close(one(x), 2 * first - one.bias + 2, rtol=1e-4, atol=1e-4)
        assert torch.equal(twin(x), first)


@on_each_set
def test_gradients_and_compilers_go_by_decoded_weights(isa):
    one, x = layer(), torch.randn(1, 200, requires_grad=True)
    with native.use(isa):
        one.activation_bits = 8
        assert not binarized.is_faster(x, 8)
        (gradient,) = torch.autograd.grad(one(x).sum(), x)
    assert gradient.shape == x.shape
    assert one._decoded is not None


def test_the_compiled_kernel_is_not_asked_for_what_it_cannot_do() -> None:
    x = torch.randn(2, 400)
    made = layer()
    made.activation_bits = 8
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        made(x)  # two rows for each that is asked for
    x = x[:, :200].contiguous()
    with torch.no_grad():
        expected = made(x)
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                assert torch.equal(made(x), expected)
            finally:
                torch.set_default_dtype(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert made(x).dtype == made(x.repeat(40, 1)).dtype == torch.bfloat16
        traced = torch.jit.trace(made, x, check_trace=False)
        torch.testing.assert_close(traced(2 * x), made(2 * x), rtol=1e-4, atol=1e-4)
