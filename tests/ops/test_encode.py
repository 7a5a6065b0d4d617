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
