"""Shortcuts of the coding kernel leave the codes of the reference: buckets, rows that share a program, two floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bellbox.core.grid import Grid, Levels
from bellbox.ops.encode import SIGMA_FLOOR, encode, normaliser
from bellbox.ops.packed_linear import operation as packed_linear
from bellbox.ops.weight_layout import prepack_operation

# numpy, which interprets, tells of NaN and overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore:.*no factor of two", "ignore:one input channel"
)

ROW = [k / 16 for k in range(-8, 7)]
THRESHOLDS = {
    "learned, far apart": [
        -900.0,
        -3.0,
        -2.9,
        -0.1,
        -1e-3,
        0.0,
        1e-3,
        0.2,
        0.3,
        0.31,
        0.32,
        7.0,
        8.0,
        9.0,
        1e4,
    ],
    "many in one bucket": [*(k * 1e-6 for k in range(14)), 1.0],
    "equal ones": [-1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0],
    "all equal": [0.5] * 15,
    "in steps": ROW,
    "nine levels": ROW[:8],
    "thirteen levels": ROW[:12],
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_any_thresholds_that_rise_give_the_codes_of_the_reference(name: str) -> None:
    thresholds = THRESHOLDS[name]
    ends = torch.tensor(thresholds)
    near = torch.cat([ends, ends.nextafter(torch.tensor(math.inf)), ends.nextafter(torch.tensor(-math.inf))])
    others = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e38, -1e38, 1e-45, -1e-45])
    x = torch.cat([near, others, torch.randn(64)])[None]
    one = torch.ones(1, 1)
    assert torch.equal(encode(x, one, thresholds, 1), encode.reference(x, one, thresholds, 1))


def coded(x: torch.Tensor, levels: Levels, block: int, normalise: str = "rms", rescale: bool = False) -> Any:
    from bellbox.ops.backends.triton.launch import coding

    weights = coding.Weights(torch.empty(0), torch.ones(8), None, Grid(16, 0.0), x.shape[1])
    thresholds = torch.tensor(levels.thresholds)
    grid = levels.grid
    return coding.code_rows(
        x, weights, grid, torch.ones(1), thresholds, torch.tensor([0.7]), None, block, normalise, rescale
    )


@pytest.mark.parametrize("normalise", ["rms", "absmax", "norm", "static"])
def test_rows_that_share_a_program_are_coded_as_alone(
    normalise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellbox.ops.backends.triton import plan

    x, levels = torch.randn(5, 128), Levels.gaussian(16)
    x[2] = math.nan
    alone = coded(x, levels, 128, normalise, normalise == "rms")
    monkeypatch.setattr(plan, "rows_each", lambda rows, warps, processors: 3)
    together = coded(x, levels, 128, normalise, normalise == "rms")
    for name in ("numbers", "sums", "scales"):
        assert torch.equal(getattr(alone, name).nan_to_num(7), getattr(together, name).nan_to_num(7))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.bfloat16, 1e25)]
)
def test_squares_in_two_floats_give_the_same_codes_and_scales(
    dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellbox.ops.backends.triton import plan

    x, levels = (torch.randn(2, 32) * size).to(dtype), Levels.gaussian(4)
    expected = coded(x, levels, 32, "rms", True)
    monkeypatch.setattr(plan, "gpu", lambda x: plan.Gpu((12, 0), 1))
    found = coded(x, levels, 32, "rms", True)
    assert bool(found.scales.isfinite().all())
    for name in ("numbers", "sums", "scales"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("columns", [1, 2, 32, 96, 1024])
def test_the_smallest_sigmas_have_the_normaliser_of_the_reference(columns: int) -> None:
    """Rows just below, at and above the floor; what is multiplied in the kernel is divided in the reference."""
    block, levels = columns & -columns, Levels.gaussian(16)
    x = (
        torch.tensor([0.0, 0.5, 1.0 - 1e-6, 1.0, 1.0 + 1e-6, 2.0, 64.0])[:, None]
        .mul(SIGMA_FLOOR)
        .expand(-1, columns)
    )
    # The scale that a level carries is exact in the result, one weight of 1 in each row.
    codes = torch.zeros(1, columns, dtype=torch.uint8)
    arguments = (
        x.contiguous(), prepack_operation.reference(codes, 16, 1), torch.ones(1), None, torch.ones(1),
        torch.tensor(levels.thresholds), None, None, columns, 16, levels.zero_point, levels.zero_point, block, "rms",
        True, torch.float32,
    )  # fmt: skip
    assert torch.equal(packed_linear(*arguments), packed_linear.reference(*arguments))
    sigma = x.double().square().mean(1, keepdim=True).sqrt()
    r = normaliser(sigma, block).float()
    integers = levels.grid.multiplier * encode.reference(x, r, levels.thresholds, block).int()
    found = coded(x, levels, block).sums
    assert torch.equal(
        found, integers.sum(1).int() - int(levels.grid.multiplier * levels.grid.offset) * columns
    )
