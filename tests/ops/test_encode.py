from __future__ import annotations

import math

import pytest
import torch

from bellbox.core.grid import Levels
from bellbox.ops import encode as module
from bellbox.ops.encode import encode, normaliser, rotate_normalise, row_scale, row_sigma, static_normaliser
from bellbox.ops.fake_quantize import bbq_backward, bbq_forward

THRESHOLDS = list(Levels.gaussian(4).thresholds)


def rows_of(count: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(count))
    return x, normaliser(row_sigma(x), 16).float()


@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (0, 32), (33, 160)])
@pytest.mark.parametrize("per_row", [True, False])
def test_operations_keep_their_registered_contract(shape, per_row):
    x, r = rows_of(*shape)
    if not per_row:
        r = torch.full((1, 1), 0.25)
    torch.library.opcheck(encode.call, (x, r, THRESHOLDS, 16))
    scale = torch.full_like(r, 0.5)
    torch.library.opcheck(bbq_forward.call, (x, r, scale, THRESHOLDS, 1.5, 16, torch.bfloat16))
    out, v = bbq_forward(x, r, scale, THRESHOLDS, 1.5, 16, torch.float32)
    torch.library.opcheck(
        bbq_backward.call, (torch.ones_like(out), v, out, r, scale, torch.ones_like(r), 16, not per_row)
    )


@pytest.mark.parametrize("features", [16, 48, 160, 7 * 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_by_their_definition(features, dtype):
    x = rows_of(11, features)[0].to(dtype)
    r = normaliser(row_sigma(x), 16).to(module.compute_dtype(x))
    v = rotate_normalise(x, r, 16)
    expected = sum((v >= t).to(torch.uint8) for t in THRESHOLDS)
    assert torch.equal(encode(x, r, THRESHOLDS, 16), expected)
    assert torch.equal(encode(x, r, THRESHOLDS, 16), Levels.gaussian(4).encode(v))


def test_chunks_and_threads_do_not_change_a_code(monkeypatch):
    x = torch.randn(67, 256)
    r = normaliser(row_sigma(x), 128).float()
    whole = encode(x, r, THRESHOLDS, 128)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 256)
    assert torch.equal(encode(x, r, THRESHOLDS, 128), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(encode(x, r, THRESHOLDS, 128), whole)
    finally:
        torch.set_num_threads(threads)
    one_by_one = torch.cat([encode(x[i : i + 1], r[i : i + 1], THRESHOLDS, 128) for i in range(len(x))])
    assert torch.equal(one_by_one, whole)


def test_a_strided_view_is_coded_like_its_copy():
    wide = torch.randn(9, 64)
    view = wide[:, ::2]
    r = normaliser(row_sigma(view), 16).float()
    assert torch.equal(encode(view, r, THRESHOLDS, 16), encode(view.contiguous(), r, THRESHOLDS, 16))


def test_ties_go_up_and_infinite_ratios_saturate():
    x = torch.tensor([[*THRESHOLDS, 1e38]])
    assert encode(x, torch.ones(1, 1), THRESHOLDS, 1).tolist() == [[1, 2, 3, 3]]
    below = torch.nextafter(x, torch.tensor(-math.inf))
    assert encode(below, torch.ones(1, 1), THRESHOLDS, 1).tolist() == [[0, 1, 2, 3]]
    assert encode(x, torch.full((1, 1), 1e30), THRESHOLDS, 1).tolist() == [[0, 2, 3, 3]]


def test_sigma_of_rows_is_exact_to_fp64():
    x = torch.randn(7, 1001) * torch.logspace(-18, 18, 7)[:, None]
    expected = [math.sqrt(math.fsum(v * v for v in row) / 1001) for row in x.tolist()]
    assert row_sigma(x)[:, 0].tolist() == pytest.approx(expected, rel=1e-14)
    assert row_sigma(x).dtype == torch.float64


def test_normaliser_floor_ceiling_and_nan():
    sigma = torch.tensor([0.0, 1e-9, 1e-8, 2.0, 1e30, 1.01e30, math.inf, math.nan], dtype=torch.float64)
    r = normaliser(sigma, 4).tolist()
    assert r[:5] == pytest.approx([5e7, 5e7, 5e7, 0.25, 5e-31])
    assert all(map(math.isnan, r[5:]))


def test_the_ceiling_keeps_every_rotation_finite():
    x = torch.full((1, 4096), 0.99e30)
    assert rotate_normalise(x, normaliser(row_sigma(x), 1024).float(), 1024).isfinite().all()


def test_a_static_normaliser_is_fixed_but_for_broken_rows():
    x = torch.randn(4, 16)
    x[1, 3] = math.nan
    x[2] = 1e35
    r = static_normaliser(torch.tensor(0.5), x, 16)
    assert r[[0, 3], 0].tolist() == [0.125, 0.125]
    assert r[[1, 2], 0].isnan().all()
    row_scales = row_scale(r, 4)
    assert row_scales[[0, 3], 0].tolist() == [1.0, 1.0]
    assert row_scales[[1, 2], 0].isnan().all()
    assert row_scale(torch.tensor([[2.0]]), 3).tolist() == [[1.0]] * 3


def test_largest_magnitudes_of_rows():
    x = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0], [-1.0, math.inf, 0.0], [0.5, math.nan, 9.0]])
    found = module.row_absmax(x)
    assert found.dtype == torch.float64
    assert found.shape == (4, 1)
    assert found[:3, 0].tolist() == [3.0, 0.0, math.inf]
    assert math.isnan(found[3, 0])


def test_a_row_is_multiplied_with_one_or_with_its_sigma_above_the_floor():
    sigma = torch.tensor([[2.0], [1e-12], [0.5]], dtype=torch.float64)
    r = torch.tensor([[0.5], [3.0], [math.nan]], dtype=torch.float64)
    found = row_scale(r, 3, sigma)
    assert found.dtype == row_scale(r, 3).dtype == torch.float32
    assert found[:2, 0].tolist() == pytest.approx([2.0, 1e-8])
    assert math.isnan(found[2, 0])
    assert row_scale(r[:1], 4, sigma[:1]).tolist() == [[2.0]] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_levels_with_the_norm_of_their_row(dtype):
    rows = torch.tensor([[3.0, -4.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]).to(dtype)
    levels = torch.tensor([[6.0, 8.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]).to(dtype)
    r = torch.tensor([[2.0], [1.0], [0.5], [math.nan]])
    found = module.kept_norm(rows, levels, r)
    assert found.dtype == torch.float32
    assert found[:3].tolist() == [[0.5], [0.0], [0.0]]
    assert found[3].isnan().all()


def test_results_have_the_dtype_of_autocast_where_that_is_active():
    x, nowhere = torch.ones(2, 2), torch.ones(2, 2, device="meta")
    assert module.result_dtype(x) == module.result_dtype(nowhere) == torch.float32
    assert module.result_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert module.result_dtype(x) == torch.bfloat16
        assert module.result_dtype(nowhere) == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert module.result_dtype(x) == torch.float32
    kinds = {torch.float64: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
    assert {dtype: module.compute_dtype(x.to(dtype)) for dtype in kinds} == kinds


def test_chunks_are_of_a_quarter_of_a_million_numbers_and_cover_all_rows():
    def ends(*shape: int, device: str = "cpu") -> list[tuple[int, int]]:
        return [(each.start, each.stop) for each in module.chunks(torch.empty(shape, device=device))]

    assert ends(5, 1 << 17) == [(0, 2), (2, 4), (4, 5)]
    assert ends(3, 1 << 20) == [(0, 1), (1, 2), (2, 3)]
    assert ends(1 << 18, 1) == [(0, 1 << 18)]
    assert ends((1 << 18) + 1, 0) == [(0, 1 << 18), (1 << 18, (1 << 18) + 1)]
    assert ends(0, 8) == []
    assert ends(5, 1 << 17, device="meta") == [(0, 5)]
    assert ends(0, 8, device="meta") == []


def test_codes_beyond_a_byte_are_refused():
    x, r = torch.zeros(1, 4), torch.ones(1, 1)
    rising = [float(i) for i in range(-255, 1)]
    assert encode(x, r, rising[1:], 1).tolist() == [[255] * 4]
    with pytest.raises(module.BellboxError, match="256 thresholds"):
        encode(x, r, rising, 1)


def test_a_forward_uses_what_each_row_is_worth_and_keeps_its_value():
    x = torch.tensor([[0.5, -1.5], [4.0, 0.0], [1.0, 1.0]])
    r, scale = torch.tensor([[1.0], [0.5], [math.nan]]), torch.tensor([[2.0], [10.0], [1.0]])
    x_hat, v = bbq_forward(x, r, scale, [-1.0, 0.0, 1.0], 1.5, 1, torch.float32)
    assert v[:2].tolist() == [[0.5, -1.5], [2.0, 0.0]]
    assert x_hat[:2].tolist() == [[1.0, -3.0], [15.0, 5.0]]
    assert x_hat[2].isnan().all()
    rotated, w = bbq_forward(x[:1], r[:1], scale[:1], [-1.0, 0.0, 1.0], 1.5, 2, torch.float32)
    assert w.tolist() == [[-1.0, 2.0]]
    assert rotated.tolist() == [[-1.0, 3.0]]


@pytest.mark.parametrize("whole_tensor", [False, True])
@pytest.mark.parametrize("block", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_backward_is_the_derivative_of_the_box(block, whole_tensor, dtype):
    """u = n Phi(v) in place of its floor, in float64 and left to autograd; v of the rotated row over its RMS."""
    draw, n = torch.Generator().manual_seed(block), 4
    x = torch.randn(6, 32, generator=draw, dtype=torch.float64)
    x, grad = x.to(dtype).double(), torch.randn(6, 32, generator=draw, dtype=torch.float64).to(dtype)
    gamma = torch.rand(1 if whole_tensor else 6, 1, generator=draw, dtype=torch.float64) + 0.5
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x.requires_grad_(True)
    rotated = (x.view(6, -1, block) @ matrix).view(6, 32) / math.sqrt(block)
    sigma = x.square().mean().sqrt() if whole_tensor else x.square().mean(-1, keepdim=True).sqrt()
    v = rotated / sigma
    smooth = gamma * (n * 0.5 * torch.erfc(-v / math.sqrt(2)) - n / 2) / (n / 2)
    (expected,) = torch.autograd.grad(smooth, x, grad.double())
    work = torch.float64 if dtype == torch.float64 else torch.float32
    r = (1 / (sigma.detach().reshape(-1, 1) * math.sqrt(block))).to(work)
    x_hat = smooth.detach().to(dtype)
    found, dots = bbq_backward(
        grad, v.detach().to(dtype), x_hat, r, gamma.to(work), torch.ones_like(r), block, whole_tensor
    )
    bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
    sums = (grad.double() * x_hat.double()).sum(-1, keepdim=True)
    torch.testing.assert_close(dots.double(), sums, rtol=bound, atol=bound)
    fixed, _ = bbq_backward(
        grad, v.detach().to(dtype), x_hat, r, gamma.to(work), torch.zeros_like(r), block, whole_tensor
    )
    through = gamma * 2 * torch.exp(-v.detach().square() / 2) / math.sqrt(2 * math.pi) * grad.double()
    constant = ((through / sigma.detach()).view(6, -1, block) @ matrix).view(6, 32) / math.sqrt(block)
    torch.testing.assert_close(fixed.double(), constant, rtol=bound, atol=bound)


def test_a_float64_input_under_autocast_has_a_backward():
    """Its normaliser is fp64, which no kernel takes: the reference does."""
    grad, v, x_hat = (torch.randn(5, 32).bfloat16() for _ in range(3))
    numbers = torch.rand(5, 1) + 0.5, torch.rand(5, 1) + 0.5, torch.ones(5, 1)
    found = bbq_backward(grad, v, x_hat, *(each.double() for each in numbers), 16, False)
    for one, other in zip(found, bbq_backward(grad, v, x_hat, *numbers, 16, False), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.02)


def test_the_backward_in_chunks_is_that_of_all_rows(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    grad, v, x_hat = (torch.randn(7, 16, generator=draw) for _ in range(3))
    r, gamma, free = torch.rand(7, 1) + 0.5, torch.rand(7, 1) + 0.5, torch.ones(7, 1)
    one = torch.full((1, 1), 0.5), torch.full((1, 1), 2.0), torch.ones(1, 1)
    calls = [((r, gamma, free), False), (one, True)]
    whole = [bbq_backward(grad, v, x_hat, *numbers, 4, together) for numbers, together in calls]
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * 16)
    for (numbers, together), expected in zip(calls, whole, strict=True):
        found = bbq_backward(grad, v, x_hat, *numbers, 4, together)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
