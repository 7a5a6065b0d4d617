from __future__ import annotations

import math

import pytest
import torch

from bellbox.ops import integer
from bellbox.ops.integer import float_matmul, integer_matmul, scaled_product
from bellbox.utils.processor import beyond_avx2, fast_int8

# Held to AVX2, oneDNN's product of int8 saturates on a larger processor; nothing of ours takes it there.
UNITS = [False] if beyond_avx2() and not fast_int8() else [False, True]
SHAPES = [(1, 1, 1), (3, 5, 7), (17, 129, 33), (0, 4, 2), (2, 4, 0), (64, 640, 16), (1, 2048, 3)]


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(
        -128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape))
    )


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_are_exact(m, k, n, units, monkeypatch):
    monkeypatch.setattr(integer, "_INTEGER_UNITS", units)
    a, b = int8(m, k), int8(n, k)
    assert torch.equal(integer_matmul(a, b).to(torch.int64), a.to(torch.int64) @ b.to(torch.int64).t())


@pytest.mark.parametrize("k", [1, 1023, 1024, 1040, 5000])
@pytest.mark.parametrize("value", [-128, 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_float_path_is_exact_too(k, value, autocast):
    a, b = torch.full((20, k), value, dtype=torch.int8), torch.full((3, k), value, dtype=torch.int8)
    a[0, 0], b[0, 0] = -127, 127
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        product = float_matmul(a, b)
    assert product.dtype == (torch.float32 if k <= 1024 else torch.float64)
    assert torch.equal(product.to(torch.int64), a.to(torch.int64) @ b.to(torch.int64).t())


@pytest.mark.parametrize("k", [33, 2500])
def test_batches_vmap_and_compilers_see_the_same_sums(k, monkeypatch):
    monkeypatch.setattr(integer, "_INTEGER_UNITS", False)
    a, b = int8(3, 7, k), int8(3, 5, k)
    expected = a.to(torch.int64) @ b.to(torch.int64).mT
    assert torch.equal(float_matmul(a, b).to(torch.int64), expected)
    assert torch.equal(torch.vmap(integer_matmul)(a, b).to(torch.int64), expected)
    compiled = torch.compile(integer_matmul, fullgraph=True, backend="eager")
    assert torch.equal(compiled(a[0], b[0]).to(torch.int64), expected[0])


class Matrix:
    """A matrix of which nothing is known but where it lies and its sizes."""

    def __init__(self, device: str, *shape: int) -> None:
        self.device, self.shape = torch.device(device), shape

    def reshape(self, *_: int) -> Matrix:
        return self

    view = t = reshape


@pytest.mark.parametrize(
    ("device", "m", "k", "n", "units", "road"),
    [
        # torch._int_mm of CUDA wants more than 16 rows, and columns and outputs in eights.
        ("cuda", 17, 16, 24, False, "integers"),
        ("cuda", 16, 16, 24, False, "floats"),
        ("cuda", 17, 15, 24, False, "floats"),
        ("cuda", 17, 14, 24, True, "floats"),
        ("cuda", 17, 12, 24, False, "floats"),
        ("cuda", 17, 16, 23, False, "floats"),
        ("cuda", 17, 16, 28, True, "floats"),
        ("cuda", 17, 9, 9, True, "floats"),
        ("cpu", 2, 3, 5, True, "integers"),
        ("cpu", 17, 16, 24, False, "floats"),
        ("mps", 17, 16, 24, True, "floats"),
    ],
)
def test_integer_units_are_used_where_they_take_the_sizes(device, m, k, n, units, road, monkeypatch):
    monkeypatch.setattr(integer, "_INTEGER_UNITS", units)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: "integers")
    monkeypatch.setattr(integer, "float_matmul", lambda a, b: "floats")
    assert integer_matmul(Matrix(device, m, k), Matrix(device, n, k)) == road


def test_one_column_is_an_outer_product_whose_strides_may_be_anything(monkeypatch):
    monkeypatch.setattr(integer, "_INTEGER_UNITS", True)
    monkeypatch.delattr(torch, "_int_mm")
    a, b = int8(5, 1), int8(3, 1)
    product = integer_matmul(a, b)
    assert product.dtype == torch.int32
    assert product.tolist() == [[int(x) * int(y) for y in b] for x in a]


def test_integer_units_make_no_difference_to_the_last_bit(monkeypatch):
    a, b, scales = int8(9, 1500), int8(6, 1500), (torch.rand(6), torch.rand(()), torch.ones(9, 1))
    a[2] = 0  # no zero may come back negative
    found = []
    for units in UNITS:
        monkeypatch.setattr(integer, "_INTEGER_UNITS", units)
        found.append(scaled_product(a, b, *scales))
    assert torch.equal(found[0].view(torch.int32), found[-1].view(torch.int32))
    assert not found[0][2].signbit().any()


def test_the_epilogue_is_three_fp32_roundings():
    a, b = int8(5, 640), int8(4, 640)
    weight_scale, act_scale = torch.rand(4), torch.rand(())
    row_scale = torch.ones(5, 1)
    row_scale[3] = math.nan
    result = scaled_product(a, b, weight_scale, act_scale, row_scale)
    assert result.dtype == torch.float32
    sums = (a.double() @ b.double().t()).float()
    for i in range(5):
        for j in range(4):
            scale = torch.tensor(float(weight_scale[j]) * float(act_scale), dtype=torch.float64).float()
            expected = torch.tensor(float(sums[i, j]) * float(scale), dtype=torch.float64).float()
            assert math.isnan(result[i, j]) if i == 3 else result[i, j] == expected


def test_autocast_does_not_touch_it():
    a, b = int8(5, 640), int8(4, 640)
    plain = scaled_product(a, b, torch.rand(4), torch.tensor(0.3), torch.ones(5, 1))
    with torch.autocast("cpu", torch.bfloat16):
        again = scaled_product(a, b, torch.rand(4), torch.tensor(0.3), torch.ones(5, 1))
    assert plain.dtype == again.dtype == torch.float32
