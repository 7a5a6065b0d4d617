"""Coding and training of rows on Triton's kernels against the torch reference: codes to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size
from bellbox.ops import kept as bytes_of
from bellbox.ops.encode import encode, normaliser, row_rms
from bellbox.ops.fake_quantize import bbq_backward, bbq_forward
from bellbox.ops.rotate import rotate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no factor of two"),
    pytest.mark.filterwarnings("ignore:one input channel"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 33), (3, 64), (2, 2304)]


def made(rows: int, columns: int, n: int, dtype: torch.dtype) -> Any:
    """Rows with ties, zeros and a NaN; their normaliser, levels, block."""
    draw = torch.Generator().manual_seed(rows * columns)
    levels, block = Levels.gaussian(n), block_size(columns)
    x = (torch.randn(rows, columns, generator=draw) * 3).to(dtype)
    r = normaliser(row_rms.reference(x), block).float()
    if rows > 1:
        r[0] = 2.0**-3
        x[0] = torch.tensor(levels.thresholds).repeat(columns)[:columns].to(dtype)
        x[1] = 0
    if rows > 2:
        x[2, 0] = float("nan")
        r[2] = float("nan")
    return x, r, levels, block


@pytest.mark.parametrize(
    ("shape", "dtype"), [*zip(SHAPES, (*DTYPES, DTYPES[1]), strict=True), (SHAPES[2], DTYPES[0])]
)
def test_codes_rotations_and_statistics(shape: tuple[int, int], dtype: torch.dtype, guards: Any) -> None:
    x, r, _, block = made(*shape, 16, dtype)
    assert torch.allclose(row_rms(x), row_rms.reference(x), rtol=1e-14, atol=0, equal_nan=True)
    arguments = x, block**-0.5, block, dtype
    assert torch.equal(rotate(*arguments).nan_to_num(3), rotate.reference(*arguments).nan_to_num(3))
    for n in (2, 3, 4, 6, 8, 13, 16):
        thresholds = Levels.gaussian(n).thresholds
        for inverse in (r, r[:1]) if n == 4 else (r,):
            assert torch.equal(
                encode(x, inverse, thresholds, block), encode.reference(x, inverse, thresholds, block)
            )
    assert guards() > 3


@pytest.mark.parametrize(("shape", "n"), [*zip(SHAPES, (2, 4, 7, 16), strict=True)])
def test_kept_bytes_and_what_is_decoded_from_them(shape: tuple[int, int], n: int, guards: Any) -> None:
    x, r, levels, block = made(*shape, n, torch.float32)
    kept = bytes_of.keep(x, r, levels.thresholds, block)
    assert torch.equal(kept, bytes_of.keep.reference(x, r, levels.thresholds, block))
    steps = bytes_of.stepped(levels.thresholds)
    assert steps is not None
    codes = bytes_of.kept_codes(kept, steps)
    assert torch.equal(codes, bytes_of.kept_codes.reference(kept, steps))
    assert torch.equal(codes, encode.reference(x, r, levels.thresholds, block))
    for dtype in DTYPES:
        for scale in (torch.rand(len(x), 1), torch.rand(1, 1)):
            arguments = kept, scale, steps, levels.offset, dtype
            assert torch.equal(bytes_of.decode_kept(*arguments), bytes_of.decode_kept.reference(*arguments))
    guards()


@pytest.mark.parametrize(
    ("shape", "dtype"), [*zip(SHAPES, (*DTYPES, DTYPES[1]), strict=True), (SHAPES[2], DTYPES[0])]
)
def test_forward_has_the_codes_and_backward_the_gradient(
    shape: tuple[int, int], dtype: torch.dtype, guards: Any
) -> None:
    x, r, levels, block = made(*shape, 8, dtype)
    x, r = x.nan_to_num(0), r.nan_to_num(1)
    scale = torch.rand(1, 1)
    arguments = x, r, scale, levels.thresholds, levels.offset, block, dtype
    x_hat, v = bbq_forward(*arguments)
    expected = bbq_forward.reference(*arguments)
    assert torch.equal(x_hat, expected[0])
    assert torch.equal(v, expected[1])
    # The backward sums and takes exponentials, in an order and to the bits of its device.
    grad = torch.randn(shape).to(dtype)
    gamma, free = scale * 4, torch.ones(len(x), 1)
    backward = grad, v, x_hat, r, gamma, free, block, False
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.06}
    for found, wanted in zip(bbq_backward(*backward), bbq_backward.reference(*backward), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.allclose(found.float(), wanted.float(), **near)
    kept = bytes_of.keep(x, r, levels.thresholds, block)
    steps = bytes_of.stepped(levels.thresholds)
    of_kept = grad, kept, r, gamma, free, steps, levels.offset, block, dtype
    wanted = bytes_of.bbq_backward_kept.reference(*of_kept)
    for found, other in zip(bytes_of.bbq_backward_kept(*of_kept), wanted, strict=True):
        assert torch.allclose(found.float(), other.float(), **near)
    guards()


def test_a_row_too_long_for_the_registers_is_passed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from bellbox.ops.backends.triton import plan

    x, r, levels, block = made(2, 384, 8, torch.float32)
    x_hat, v = bbq_forward.reference(x, r, torch.ones(1, 1), levels.thresholds, levels.offset, block, x.dtype)
    arguments = torch.randn(2, 384), v, x_hat, r, torch.ones(1, 1), torch.ones(2, 1), block, False
    whole = bbq_backward(*arguments)
    monkeypatch.setattr(plan, "WHOLE_ROW", 256)
    monkeypatch.setattr(plan, "_PIECE", 128)
    for found, other in zip(bbq_backward(*arguments), whole, strict=True):
        assert torch.allclose(found, other, rtol=1e-5, atol=1e-6)


def test_a_row_whose_scale_is_not_finite_is_nan_in_the_forward() -> None:
    x, r, levels, block = made(3, 64, 4, torch.float32)
    x_hat, _ = bbq_forward(x, r, torch.ones(1, 1), levels.thresholds, levels.offset, block, torch.float32)
    assert bool(x_hat[2].isnan().all())
    assert not bool(x_hat[:2].isnan().any())
