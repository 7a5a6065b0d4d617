"""Packed layers on Triton's kernels: the bits of the torch reference, whatever the shape, width and path."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from bellbox.core.grid import Grid, Levels
from bellbox.core.hadamard import block_size
from bellbox.errors import BellboxError
from bellbox.ops import packed_linear
from bellbox.ops.kept import keep, kept_linear, stepped
from bellbox.ops.weight_layout import prepack, prepack_operation, unpack, unpack_operation

pytestmark = pytest.mark.filterwarnings("ignore:.*no factor of two")
NAN = float("nan")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, NaN included."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))
        and torch.equal(a.isnan(), b.isnan())
    )


def layer(
    rows: int, outputs: int, columns: int, weights: int, inputs: int, normalise: str = "rms", rescale: bool = False,
    dtype: torch.dtype = torch.float32, signs: bool = False, bias: bool = True, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `packed_linear`, with rows of zeros, of NaN, and of values on thresholds where there is room."""
    draw = torch.Generator().manual_seed(seed)
    w, a = Levels.gaussian(weights), Levels.gaussian(inputs)
    codes = torch.randint(0, weights, (outputs, columns), dtype=torch.uint8, generator=draw)
    x = torch.randn(rows, columns, generator=draw)
    block = 1 if normalise == "absmax" else block_size(columns)
    if rows > 2:
        x[1, columns // 2] = NAN
        x[2] = 0
    if rows > 3:
        x[3, 0] = 1e31
    if rows > 4:
        x[4] = torch.tensor(a.thresholds).repeat(columns)[:columns]
    return (
        x.to(dtype), prepack_operation.reference(codes, weights, 1), torch.rand(outputs, generator=draw),
        torch.randn(outputs, generator=draw) if bias else None, torch.rand(1, generator=draw),
        torch.tensor(a.thresholds), torch.tensor([0.9]) if normalise == "static" else None,
        torch.randint(0, 2, (columns,), generator=draw).mul(2).sub(1).to(torch.int8) if signs else None,
        columns, weights, w.zero_point, a.zero_point, block, normalise, rescale, dtype,
    )  # fmt: skip


def check(arguments: tuple[Any, ...]) -> None:
    assert same(packed_linear.operation(*arguments), packed_linear.operation.reference(*arguments))


@pytest.mark.parametrize(
    "case",
    [
        (1, 7, 64, 4, 4), (5, 20, 200, 16, 16, "rms", True), (5, 33, 320, 8, 8, "static", False, torch.bfloat16),
        (3, 20, 128, 2, 2, "absmax", True), (6, 21, 96, 3, 5, "norm", True), (2, 20, 300, 4, 2), (4, 17, 77, 16, 3),
        (2, 20, 300, 2, 4, "rms", True, torch.float16), (3, 16, 64, 2, 16, "rms", False, torch.float32, True),
        (2, 33, 520, 2, 2, "static", False, torch.float32, True, False), (1, 1, 1, 16, 2), (1, 3, 2, 2, 2),
    ],
)  # fmt: skip
def test_every_statistic_width_and_dtype_has_the_bits_of_the_reference(case: Any) -> None:
    check(layer(*case))


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_have_the_bits_of_the_reference(seed: int) -> None:
    draw = random.Random(seed)
    weights, inputs = draw.choice((2, 3, 4, 7, 8, 12, 16)), draw.choice((2, 3, 4, 8, 16))
    shape = draw.randint(1, 6), draw.randint(1, 90), draw.choice((8, 24, 64, 130, 192, 256, 330))
    normalise = draw.choice(("rms", "static"))
    rescale = normalise == "rms" and draw.random() < 0.5
    check(layer(*shape, weights, inputs, normalise, rescale, seed=seed))


def test_many_rows_take_larger_tiles() -> None:
    check(layer(33, 70, 130, 8, 16))


@pytest.mark.parametrize("levels", [2, 4, 8, 16])
def test_pieces_of_the_columns_change_no_bit(levels: int) -> None:
    from bellbox.ops.backends.triton import plan
    from bellbox.ops.backends.triton.launch import coding, products

    arguments = layer(4, 40, 600, levels, 16, "rms", True)
    x, weight, scale, bias, act_scale, thresholds, *_ = arguments
    weights = coding.Weights(weight, scale, bias, Grid(levels, arguments[10]), 600)
    rows = coding.code_rows(
        x, weights, Grid(16, 0.0), act_scale, thresholds, None, None, arguments[12], "rms", True
    )
    expected = packed_linear.operation.reference(*arguments)
    for splits in (1, 2, 3):
        tiles = plan.Tiles(16, 32, splits, 4, 1)
        assert same(products.multiply(rows, weights, torch.float32, tiles), expected)


@pytest.mark.parametrize(("weights", "inputs"), [(2, 2), (2, 4), (4, 2), (4, 4), (3, 3)])
def test_bit_planes_serve_few_rows_of_few_levels(
    weights: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellbox.ops.backends.triton import plan
    from bellbox.ops.backends.triton.launch import coding

    arguments = layer(4, 37, 330, weights, inputs)
    expected = packed_linear.operation.reference(*arguments)
    assert coding.on_planes(4, weights, inputs)
    assert same(packed_linear.operation(*arguments), expected)
    monkeypatch.setattr(plan, "PLANE_ROWS", 0)
    assert same(packed_linear.operation(*arguments), expected)


def test_a_row_too_long_for_the_registers_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from bellbox.ops.backends.triton import plan

    monkeypatch.setattr(plan, "WHOLE_ROW", 256)
    monkeypatch.setattr(plan, "WHOLE_CODED_ROW", 256)
    monkeypatch.setattr(plan, "_PIECE", 128)
    for normalise, weights, columns in (("rms", 16, 384), ("absmax", 4, 330), ("norm", 8, 384)):
        check(layer(5, 5, columns, weights, 16, normalise, normalise != "rms"))
    check(layer(4, 5, 330, 2, 2, "static"))  # on bit planes


@pytest.mark.parametrize("blocks", range(1, 18))
def test_nothing_is_written_beside_a_buffer(blocks: int, guards: Any) -> None:
    """bitsandbytes 2042: scales stored past the end for some numbers of blocks."""
    levels = (2, 4, 8, 16)[blocks % 4]
    arguments = layer(blocks, 5, 64 * blocks - blocks % 3, levels, (16, 4, 2)[blocks % 3])
    found = packed_linear.operation(*arguments)
    assert guards() >= 4  # codes, sums and scales of the rows; the result
    assert same(found, packed_linear.operation.reference(*arguments))


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 69)])
def test_the_layout_and_back(levels: int, shape: tuple[int, int], guards: Any) -> None:
    codes = torch.randint(0, levels, shape, dtype=torch.uint8)
    places = 3 if shape[1] % 3 == 0 else 1
    packed = prepack(codes, levels, places)
    assert torch.equal(packed, prepack_operation.reference(codes, levels, places))
    assert torch.equal(unpack(packed, *shape, levels), codes)
    assert torch.equal(unpack_operation.reference(packed, *shape, levels), codes)
    guards()


@pytest.mark.parametrize(("weights", "inputs"), [(16, 16), (8, 4), (4, 2), (2, 16)])
def test_rows_that_are_coded_already(weights: int, inputs: int) -> None:
    a, w = Levels.gaussian(inputs), Levels.gaussian(weights)
    x, packed, scale, bias, act_scale, *_ = layer(3, 21, 200, weights, inputs)
    kept = keep(x.nan_to_num(0.0), torch.ones(3, 1), a.thresholds, 8)
    for row_scale in (torch.rand(3, 1), torch.ones(1, 1)):
        arguments = (
            kept, row_scale, packed, scale, bias, act_scale, stepped(a.thresholds), weights, w.zero_point,
            a.zero_point, torch.bfloat16,
        )  # fmt: skip
        assert same(kept_linear(*arguments), kept_linear.reference(*arguments))


def test_leading_dimensions_and_strides_are_kept() -> None:
    arguments = layer(6, 9, 64, 4, 4)
    expected = packed_linear.operation.reference(*arguments)
    x = arguments[0]
    wide = torch.cat((x, x), 1)[:, :64].reshape(2, 3, 64)
    assert same(packed_linear.operation(wide, *arguments[1:]), expected.reshape(2, 3, 9))


def test_what_does_not_fit_is_refused_as_everywhere() -> None:
    arguments = list(layer(2, 5, 64, 4, 4))
    with pytest.raises(BellboxError, match="a packed layer of 64 inputs got shape"):
        packed_linear.operation(torch.ones(2, 63), *arguments[1:])
    with pytest.raises(BellboxError, match="bias does not have 5 numbers"):
        packed_linear.operation(*arguments[:3], torch.ones(4), *arguments[4:])
    with pytest.raises(
        BellboxError, match=r"BELLBOX_BACKEND=triton does not take packed_linear: x is torch\.float64"
    ):
        packed_linear.operation(arguments[0].double(), *arguments[1:])


@pytest.mark.parametrize("levels", [2, 8])
def test_the_product_of_torchs_library_gives_the_same_bits(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellbox.ops.backends.triton import plan

    arguments = layer(19, 24, 330, levels, 16, "rms", True)
    expected = packed_linear.operation(*arguments)
    product, used = torch._int_mm, list[int]()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: used.append(1) or product(a, b))
    monkeypatch.setattr(plan, "library_rows", lambda on: 17)
    assert same(packed_linear.operation(*arguments), expected)
    assert used


@pytest.mark.parametrize(("weights", "inputs"), [(2, 4), (4, 3), (7, 8)])
def test_products_of_e2m1_give_the_same_bits(
    weights: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellbox.ops.backends.triton import plan
    from bellbox.ops.backends.triton.launch import products

    arguments = layer(17, 21, 330, weights, inputs, "rms", True)
    expected = packed_linear.operation.reference(*arguments)
    monkeypatch.setattr(plan, "fp4", lambda on: True)
    monkeypatch.setattr(plan, "fp4_tiles", lambda rows: plan.Tiles(32, 32, 1, 4, 1))
    multiply, used = products._multiply_fp4, list[int]()
    monkeypatch.setattr(products, "_multiply_fp4", lambda *a: used.append(1) or multiply(*a))
    assert same(packed_linear.operation(*arguments), expected)
    assert used


def test_what_e2m1_cannot_hold_multiplies_as_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    from bellbox.ops.backends.triton import plan
    from bellbox.ops.backends.triton.launch import coding

    grid = {n: Levels.gaussian(n).grid for n in (2, 4, 8, 16)}
    blackwell, hopper = plan.Gpu((12, 0), 170), plan.Gpu((9, 0), 132)
    assert not coding.on_fp4(64, grid[4], grid[4], blackwell)  # nobody has seen it run yet
    known = plan.tables()["sm_90"]
    monkeypatch.setattr(plan, "table", lambda on: plan.replace(known, fp4=True))
    assert coding.on_fp4(64, grid[8], grid[8], blackwell)
    assert not coding.on_fp4(64, grid[8], Grid(8, -0.5), blackwell)  # 5 and 7
    assert not coding.on_fp4(64, grid[8], grid[16], blackwell)
    assert not coding.on_fp4(64, grid[16], grid[4], blackwell)
    assert not coding.on_fp4(16, grid[4], grid[4], blackwell)
    assert not coding.on_fp4(64, grid[4], grid[4], hopper)


@pytest.mark.parametrize(
    ("weights", "inputs", "width"),
    [
        (2, 2, 1),
        (2, 4, 2),
        (2, 16, 4),
        (3, 3, 2),
        (4, 2, 2),
        (4, 4, 2),
        (8, 8, 4),
        (8, 3, 2),
        (16, 16, 4),
        (13, 2, 4),
    ],
)
@pytest.mark.parametrize("splits", [1, 3])
def test_inputs_packed_as_the_weights_are_give_the_same_bits(
    weights: int, inputs: int, width: int, splits: int, guards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellbox.ops.backends.triton import plan
    from bellbox.ops.backends.triton.launch import coding, linear

    arguments = layer(18, 21, 330, weights, inputs, "rms", True)
    expected = packed_linear.operation.reference(*arguments)
    monkeypatch.setattr(plan, "packs_rows", lambda rows, on: True)
    monkeypatch.setattr(plan, "tiles", lambda *shape: plan.Tiles(32, 32, splits, 4, 1))
    code_rows, coded = linear.code_rows, list[coding.Rows]()
    monkeypatch.setattr(linear, "code_rows", lambda *a: coded.append(code_rows(*a)) or coded[-1])
    assert same(packed_linear.operation(*arguments), expected)
    assert coded[0].form == coding.Form("packed", width)
    assert coded[0].numbers.shape == (18, coded[0].padded * width // 8)
    guards()


def test_packed_inputs_are_one_choice_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from bellbox.ops.backends.triton import plan
    from bellbox.ops.backends.triton.launch import coding

    weights = coding.Weights(torch.empty(0), torch.ones(8), None, Levels.gaussian(16).grid, 128)
    on, grid = plan.Gpu((8, 9), 128), Levels.gaussian(4).grid
    assert coding.form_of(4096, weights, grid, on).kind == "int8"  # nobody has measured it
    known = plan.tables()["sm_80"]
    monkeypatch.setattr(plan, "table", lambda on: plan.replace(known, packed_rows=1024))
    assert coding.form_of(4096, weights, grid, on) == coding.Form("packed", 4)
    assert coding.form_of(64, weights, grid, on).kind == "int8"
    assert coding.form_of(4096, weights, Grid(4, 1.5), on) == coding.Form("packed", 4)
    assert coding.form_of(4096, weights, Grid(4, -8.0), on).kind == "int8"  # integers all above zero
