"""One byte a number: its code is exact, its value near; on every instruction set that this processor has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bellbox.core.grid import Grid, Levels
from bellbox.core.hadamard import block_size, butterfly
from bellbox.errors import BellboxError
from bellbox.ops import native, packed_linear
from bellbox.ops.encode import encode, normaliser, row_sigma
from bellbox.ops.kept import (
    MOST,
    STEPS,
    bbq_backward_kept,
    decode_kept,
    keep,
    kept_codes,
    kept_linear,
    kept_product,
    stepped,
    thresholds_of_codes,
)
from bellbox.ops.weight_layout import prepack

ISAS = native.instruction_sets() if native.available() else []
DTYPES = (torch.float32, torch.bfloat16)


def steps_of(levels: Levels) -> tuple[float, ...]:
    found = stepped(levels.thresholds)
    assert found is not None
    return found


def made(rows: int, columns: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Rows with values at thresholds, their normaliser, levels and block."""
    draw = torch.Generator().manual_seed(seed)
    levels, block = Levels.gaussian(n), block_size(columns)
    x = (torch.randn(rows, columns, generator=draw) * 3).to(dtype)
    r = normaliser(row_sigma(x), block).float()
    if block == 1 and rows > 1:  # ties: thresholds themselves
        x[0] = torch.tensor(levels.thresholds).repeat(columns)[:columns].to(dtype)
        r[0] = 1.0
    return x, r, levels, block


@pytest.fixture(params=["reference", *ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "reference":
        monkeypatch.setenv("BELLBOX_BACKEND", "reference")
        yield None
    else:
        with native.use(request.param):
            yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize(("rows", "columns"), [(5, 33), (3, 64), (7, 200), (2, 1024), (4, 128)])
def test_the_code_is_exact_and_the_value_near(
    isa: Any, dtype: torch.dtype, n: int, rows: int, columns: int
) -> None:
    x, r, levels, block = made(rows, columns, n, dtype)
    kept = keep(x, r, levels.thresholds, block)
    codes = encode(x, r, levels.thresholds, block)
    assert torch.equal(kept_codes(kept, steps_of(levels)), codes)
    v = butterfly(x.float(), block) * r
    inside = v.abs() < MOST / STEPS
    error = (kept.float() / STEPS - v).abs()[inside]
    assert float(error.max()) <= 1 / STEPS
    near = torch.stack([(v - t).abs() < 1 / STEPS for t in levels.thresholds]).any(0)[inside]
    assert float(error[~near].max()) <= 0.5 / STEPS + 1e-6
    assert kept.min() >= -MOST


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 300), n=st.integers(2, 16), outputs=st.integers(1, 40),
    bf16=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_instruction_set_gives_the_bits_of_the_reference(
    rows: int, columns: int, n: int, outputs: int, bf16: bool, seed: int
) -> None:
    dtype = DTYPES[bf16]
    x, r, levels, block = made(rows, columns, n, dtype, seed)
    x[-1, 0] = math.nan if seed % 5 == 0 else x[-1, 0]
    r[-1] = math.nan if seed % 5 == 0 else r[-1]
    thresholds, scale = steps_of(levels), torch.rand(rows, 1) + 0.1
    grad = torch.randn(rows, columns).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    packed = prepack(torch.randint(n, (outputs, columns), generator=draw, dtype=torch.uint8), n)
    weight_scale, bias = torch.rand(outputs, generator=draw), torch.randn(outputs, generator=draw)
    free = torch.ones(rows, 1)

    def results() -> list[Tensor]:
        kept = keep(x, r, levels.thresholds, block)
        numbers = n, levels.zero_point, levels.zero_point, dtype
        marks = r - r + 1
        act_scale = torch.tensor([0.3])
        return [
            kept,
            kept_codes(kept, thresholds),
            decode_kept(kept, scale, thresholds, levels.offset, dtype),
            kept_linear(kept, marks, packed, weight_scale, bias, act_scale, thresholds, *numbers),
            *bbq_backward_kept(grad, kept, r, scale, free, thresholds, levels.offset, block, torch.float32),
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BELLBOX_BACKEND", "reference")
        wanted = results()
    for name in ISAS:
        with native.use(name):
            found = results()
        for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
            if index < 4:
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), (name, index)
            else:  # sums in other orders
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("n", [2, 4, 5, 16])
def test_the_product_is_that_of_the_packed_layer(isa: Any, n: int) -> None:
    x, r, levels, block = made(70, 192, n)
    draw = torch.Generator().manual_seed(1)
    packed = prepack(torch.randint(n, (50, 192), generator=draw, dtype=torch.uint8), n)
    weight_scale, bias = torch.rand(50, generator=draw), torch.randn(50, generator=draw)
    act_scale, thresholds = torch.tensor([0.7]), torch.tensor(levels.thresholds)
    numbers = 192, n, levels.zero_point, levels.zero_point, block, "rms", False
    for dtype in DTYPES:
        wanted = packed_linear.operation(
            x, packed, weight_scale, bias, act_scale, thresholds, None, None, *numbers, dtype
        )
        kept, grids = keep(x, r, levels.thresholds, block), (n, levels.zero_point, levels.zero_point)
        found = kept_linear(
            kept, torch.ones(1, 1), packed, weight_scale, bias, act_scale, steps_of(levels), *grids, dtype
        )
        assert torch.equal(found, wanted)


def test_codes_of_any_grid_are_kept_as_they_are(isa: Any) -> None:
    codes = torch.randint(16, (5, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    kept = codes.view(torch.int8)
    assert torch.equal(kept_codes(kept, thresholds_of_codes(16)), codes)
    out = decode_kept(kept, torch.full((1, 1), 0.5), thresholds_of_codes(16), 7.5, torch.float32)
    assert torch.equal(out, Grid(16, -0.5).decode(codes) * 0.5)


def test_the_backward_is_that_of_the_values_that_are_kept(isa: Any) -> None:
    x, r, levels, block = made(6, 256, 4)
    grad = torch.randn(6, 256, generator=torch.Generator().manual_seed(3))
    kept, gamma = keep(x, r, levels.thresholds, block), torch.tensor([[1.7]])
    found, dots = bbq_backward_kept(
        grad, kept, r, gamma, torch.ones(6, 1), steps_of(levels), levels.offset, block, torch.float32
    )
    v, wide = kept.double() / STEPS, grad.double()
    bell = 2 * 1.7 * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi) * wide
    inner = (bell - v * (bell * v).mean(-1, keepdim=True)) * r.double()
    torch.testing.assert_close(found.double(), butterfly(inner, block), rtol=1e-5, atol=1e-6)
    codes = torch.bucketize(v, torch.tensor(steps_of(levels), dtype=torch.float64), right=True)
    wanted = (wide * (codes - levels.offset)).sum(-1, keepdim=True)
    torch.testing.assert_close(dots.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_gradient_in_bf16_gives_fp32_with_nothing_rounded_between(isa: Any) -> None:
    x, r, levels, block = made(6, 256, 4)
    kept, gamma = keep(x, r, levels.thresholds, block), torch.tensor([[1.7]])
    grad = torch.randn(6, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    rest = kept, r, gamma, torch.ones(6, 1), steps_of(levels), levels.offset, block, torch.float32
    found, _ = bbq_backward_kept(grad, *rest)
    wanted, _ = bbq_backward_kept(grad.float(), *rest)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_shapes_are_known_without_numbers() -> None:
    kept, r = torch.zeros(6, 64, dtype=torch.int8, device="meta"), torch.ones(6, 1, device="meta")
    grad = torch.zeros(6, 9, device="meta")
    assert kept_product(grad, kept, r, (0.0,), 0.5, True).shape == (9, 64)
    assert kept_product(grad.t(), kept, r, (0.0,), 0.5, False).shape == (9, 64)
    with FakeTensorMode() as mode:
        kept, r = mode.from_tensor(torch.zeros(6, 64, dtype=torch.int8)), mode.from_tensor(torch.ones(6, 1))
        grad = mode.from_tensor(torch.zeros(6, 64))
        g_x, dots = bbq_backward_kept(grad, kept, r, r, r, (0.0,), 0.5, 64, torch.bfloat16)
        assert (g_x.shape, g_x.dtype, dots.shape) == ((6, 64), torch.bfloat16, (6, 1))
        assert kept_product(grad[:, :9], kept, r, (0.0,), 0.5, True).shape == (9, 64)
        assert kept_product(grad.t(), kept, r, (0.0,), 0.5, False).shape == (64, 64)


def test_the_gradient_is_multiplied_with_what_the_bytes_stand_for(isa: Any) -> None:
    x, r, levels, block = made(40, 96, 4)
    kept, thresholds = keep(x, r, levels.thresholds, block), steps_of(levels)
    scale = torch.rand(40, 1, generator=torch.Generator().manual_seed(0))
    value = (encode(x, r, levels.thresholds, block).double() - levels.offset) * scale
    grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    found = kept_product(grad, kept, scale, thresholds, levels.offset, True)
    torch.testing.assert_close(found.double(), grad.double().t() @ value, rtol=1e-4, atol=1e-4)
    other = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    found = kept_product(other, kept, scale, thresholds, levels.offset, False)
    torch.testing.assert_close(found.double(), other.double() @ value, rtol=1e-4, atol=1e-4)


def test_what_bytes_cannot_keep_is_refused(isa: Any) -> None:
    x, r = torch.zeros(2, 64), torch.ones(2, 1)
    for thresholds in ((0.01, 0.02), (0.0, 4.0), (-5.0, 0.0), (0.0, math.inf)):
        assert stepped(thresholds) is None
        with pytest.raises(BellboxError, match="apart"):
            keep(x, r, thresholds, 1)
    kept = torch.zeros(2, 64, dtype=torch.int8)
    with pytest.raises(BellboxError, match="fit"):
        kept_product(torch.zeros(3, 5), kept, torch.ones(1, 1), (0.0,), 0.5, True)
    weight, numbers = torch.zeros(5, dtype=torch.uint8), (4, -0.5, -0.5, torch.float32)
    with pytest.raises(BellboxError, match="hold"):
        kept_linear(kept, r, weight, torch.ones(9), None, torch.ones(1), (0.0,), *numbers)
    for wrong in (kept.float(), kept[0]):
        with pytest.raises(BellboxError, match="kept bytes"):
            kept_codes(wrong, (0.0,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 64, 333])
def test_the_rms_of_rows_is_that_of_float64(isa: Any, dtype: torch.dtype, columns: int) -> None:
    x = (torch.randn(9, columns, generator=torch.Generator().manual_seed(0)) * 1e3).to(dtype)
    x[1] = 0
    wanted = x.double().square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(row_sigma(x), wanted, rtol=1e-14, atol=0)
