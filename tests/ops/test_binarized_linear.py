from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bellbox.errors import BellboxError
from bellbox.nn.binarized_linear import round_activations
from bellbox.ops import native
from bellbox.ops.binarized_linear import MAX_ROWS, is_faster, lay_out, operation, read_back, reference

SETS = native.instruction_sets()
needs_kernels = pytest.mark.skipif(not SETS, reason="the compiled kernels were not built")


def matrix(rows: int, columns: int, block: int, share: float, bias: bool = True, seed: int = 0):
    """Planes, salient columns, scales of any magnitude (denormals of fp16 too), bias."""
    g = torch.Generator().manual_seed(seed)
    signs, bits = torch.rand(2, rows, columns, generator=g) < 0.5
    salient = torch.rand(columns, generator=g) < share
    scales = torch.randn(rows, -(-columns // block), 7, generator=g)
    scales = (scales * 10 ** (6 * torch.rand(scales.shape, generator=g) - 6)).half()
    return signs, bits, salient, scales, block, torch.randn(rows, generator=g) if bias else None


def rounded(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
    return (x / scale).round().to(torch.int8), scale


def multiply(x: torch.Tensor, bits: int, *stored) -> torch.Tensor:
    *parts, block, bias = stored
    return operation.direct(x, *lay_out(*parts, block), bias, len(parts[0]), block, bits)


def assert_the_bits_of_the_reference(x, bits, *stored) -> None:
    wanted = reference(*rounded(x, bits), *stored)
    for isa in SETS:
        with native.use(isa):
            assert torch.equal(multiply(x, bits, *stored), wanted), isa


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    block=st.sampled_from([8, 64, 128, 200]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bits=st.integers(2, 8),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
@needs_kernels
def test_every_instruction_set_has_the_bits_of_the_reference(
    tokens, rows, columns, block, share, bits, bias, seed
):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    assert_the_bits_of_the_reference(x, bits, *matrix(rows, columns, block, share, bias, seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    block=st.sampled_from([8, 64, 200]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1 << 20),
)
def test_what_is_laid_out_is_read_back(rows, columns, block, share, seed):
    *parts, _, _ = matrix(rows, columns, block, share, False, seed)
    for found, wanted in zip(read_back(lay_out(*parts, block), rows, columns), parts, strict=True):
        assert torch.equal(found, wanted)


def test_the_operation_has_its_reference_and_refuses_what_does_not_fit(monkeypatch):
    *parts, block, bias = matrix(33, 100, 64, 0.2)
    x, laid = torch.randn(2, 3, 100), lay_out(*parts, block)
    x[0, 1, 5] = float("nan")
    usual = operation(x, *laid, bias, 33, block, 8)
    monkeypatch.setenv("BELLBOX_BACKEND", "reference")
    found = operation(x, *laid, bias, 33, block, 8)
    assert found.shape == (2, 3, 33)
    assert torch.equal(found.nan_to_num(7), usual.nan_to_num(7))
    assert bool(found[0, 1].isnan().all())
    for backend in ("reference", ""):
        monkeypatch.setenv("BELLBOX_BACKEND", backend)
        for wrong in (
            (x[..., :99].contiguous(), *laid, bias, 33, 32, 8),
            (x, laid.planes[:1], *laid[1:], bias, 33, block, 8),
            (x, laid.planes, laid.scales.float(), *laid[2:], bias, 33, block, 8),
            (x, *laid[:2], laid.order + 90, laid.steps, bias, 33, block, 8),
            (x, *laid[:3], laid.steps - 1, bias, 33, block, 8),
            (x, *laid, bias[:3], 33, block, 8),
            (x, *laid, bias, 49, block, 8),
            (x, *laid, bias, 33, block, 9),
            (x.double(), *laid, bias, 33, block, 8),
        ):
            with pytest.raises(BellboxError, match="binarized layer"):
                operation(*wrong)


@needs_kernels
def test_the_largest_sums_and_ties_of_rounding():
    stored = matrix(17, 256, 128, 0.2)
    x = torch.full((3, 256), 127.0)
    x[1, ::2] = -127
    x[2] = torch.arange(256) - 127.5  # halves: to even
    x[2, 255] = 127
    assert_the_bits_of_the_reference(x, 8, *stored)


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
def test_zeros_give_the_bias_and_what_is_not_finite_gives_nan(isa):
    stored = matrix(20, 100, 64, 0.1)
    x = torch.randn(5, 100)
    x[0] = 0
    x[1, 3], x[2, 99], x[3, 50] = float("nan"), float("inf"), float("-inf")
    with native.use(isa):
        y = multiply(x, 8, *stored)
    assert torch.equal(y[0], stored[-1])
    assert bool(y[1:4].isnan().all())
    assert bool(y[4].isfinite().all())


def test_the_reference_is_the_decoded_product():
    from bellbox.core.binarize import Binarized, decode

    signs, bits, salient, scales, block, bias = matrix(30, 200, 64, 0.1)
    parts = [
        decode(
            Binarized(*(plane[..., here] for plane in (signs, bits, salient)), scales[:, number]),
            torch.float64,
        )
        for number, here in enumerate(slice(at, at + block) for at in range(0, 200, block))
    ]
    x = torch.randn(4, 200)
    wanted = round_activations(x.double(), 8) @ torch.cat(parts, 1).T + bias
    found = reference(*rounded(x, 8), signs, bits, salient, scales, block, bias)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@needs_kernels
@pytest.mark.parametrize("columns", [520, 1100])
def test_long_blocks_fill_more_than_a_piece_of_their_sums(columns):
    stored = matrix(33, columns, columns, 0.5)
    assert_the_bits_of_the_reference(torch.randn(3, columns), 8, *stored)
    x = torch.full((2, columns), 127.0)
    x[1] = -127
    assert_the_bits_of_the_reference(x, 8, *stored)


@needs_kernels
def test_rows_that_do_not_fit_one_pass_over_the_weights():
    assert_the_bits_of_the_reference(torch.randn(11, 6000), 8, *matrix(20, 6000, 128, 0.1))


@needs_kernels
def test_plain_cpp_is_never_the_faster_way():
    with native.use("portable"):
        assert not is_faster(torch.ones(1, 8), 8)


@needs_kernels
@pytest.mark.parametrize("isa", [name for name in SETS if name in MAX_ROWS])
def test_what_it_serves(isa):
    with native.use(isa):
        x = torch.ones(MAX_ROWS[isa], 8)
        assert is_faster(x, 8)
        assert is_faster(x, 6)
        assert not is_faster(x, 16)
        assert not is_faster(torch.ones(MAX_ROWS[isa] + 1, 8), 8)
        assert not is_faster(x.bfloat16(), 8)
        assert not is_faster(torch.ones(0, 8), 8)
        assert not is_faster(x.requires_grad_(), 8)
        with torch.no_grad():
            assert is_faster(x, 8)
