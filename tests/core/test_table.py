from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bellbox.core.table import TableCoding, table_values
from bellbox.errors import BellboxError

CODINGS = [TableCoding(8), TableCoding(4, 32), TableCoding(4, 64)]


def table(rows: int = 7, columns: int = 192, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    uneven = torch.rand(rows, columns // 32, generator=generator).pow(4).repeat_interleave(32, 1)
    return torch.randn(rows, columns, generator=generator) * sizes * uneven


def one_row(row: np.ndarray, group: int) -> tuple[list[int], list[int], np.float32]:
    """4 bits by groups, number by number, in numpy's fp32."""
    largest = [np.abs(part).max() for part in row.reshape(-1, group)]
    top = max(largest)
    scale = np.float32(top / np.float32(7 * 255))
    multipliers = [
        min(255, math.ceil(np.float32(np.float32(each / top) * np.float32(255)))) for each in largest
    ]
    integers: list[int] = []
    for part, multiplier in zip(row.reshape(-1, group), multipliers, strict=True):
        unit = max(np.float32(scale * np.float32(multiplier)), np.float32(1e-30))
        integers += [int(np.clip(np.rint(np.float32(value / unit)), -7, 7)) for value in part]
    return integers, multipliers, scale


@pytest.mark.parametrize("group", [32, 64])
def test_four_bits_are_the_definition_number_by_number(group: int) -> None:
    weight = table()
    codes = TableCoding(4, group).round(weight)
    assert codes.multipliers is not None
    for row, packed, multipliers, scale in zip(weight.numpy(), *codes, strict=True):
        integers, expected, unit = one_row(row, group)
        assert multipliers.tolist() == expected
        assert float(scale) == float(unit)
        halves = [half for byte in packed.tolist() for half in (byte & 15, byte >> 4)]
        assert [half - 8 for half in halves] == integers


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_training_sees_the_stored_numbers_to_the_bit(coding: TableCoding) -> None:
    weight = table(50, 320, seed=1)
    weight[3], weight[4, :64], weight[5] = 0.0, 0.0, 1e-38
    codes = coding.round(weight)
    values = table_values(codes)
    assert torch.equal(coding.fake(weight).view(torch.int32), values.view(torch.int32))  # -0 is another one
    assert not values[3].any()
    assert not values[4, :64].any()
    # Half a step: that of the group's largest entry, and with a multiplier at most a 255th of the row's more.
    group = coding.group or 320
    top = weight.abs().unflatten(1, (-1, group)).amax(-1).repeat_interleave(group, 1)
    more = weight.abs().amax(1, keepdim=True) / 255 if coding.group else 0.0
    assert bool(((values - weight).abs() <= 0.5001 * (top + more) / coding.most + 1e-30).all())


def test_rows_stand_alone() -> None:
    """What makes it right to round only the rows that a batch reads."""
    weight = table(20)
    for coding in CODINGS:
        assert torch.equal(coding.fake(weight)[5:9], coding.fake(weight[5:9]))


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan_in_its_row(coding: TableCoding, value: float) -> None:
    weight = table()
    weight[2, 100] = value
    for found in (coding.fake(weight), table_values(coding.round(weight))):
        assert bool(found[2].isnan().all())
        assert bool(found[:2].isfinite().all())
        assert bool(found[3:].isfinite().all())


@pytest.mark.parametrize("coding", CODINGS)
def test_a_table_of_no_rows_is_rounded_too(coding: TableCoding) -> None:
    """As an embedding's rows are where it is asked for no tokens."""
    assert coding.fake(torch.empty(0, 192)).shape == (0, 192)
    assert table_values(coding.round(torch.empty(0, 192))).shape == (0, 192)


def test_codings_that_do_not_exist_are_refused() -> None:
    assert TableCoding.of(4, None, 640) == TableCoding(4, 64)
    assert TableCoding.of(4, None, 96) == TableCoding(4, 32)
    for bits, group, columns, message in (
        (3, None, 64, "4 or 8 bits, not 3"),
        (8, 64, 64, "leave out the group 64"),
        (4, 16, 64, "groups of 32 or 64 columns, not 16"),
        (4, 64, 96, "groups of 64 do not divide the 96 columns"),
        (4, None, 100, "groups of 32 do not divide the 100 columns"),
    ):
        with pytest.raises(BellboxError, match=message):
            TableCoding.of(bits, group, columns)
