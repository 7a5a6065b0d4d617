"""Packed bytes as numbers, and a weight-only layer that decodes by them."""

from __future__ import annotations

import pytest
import torch

from bellbox.core import packing
from bellbox.core.grid import Grid
from bellbox.nn.weight_only import WeightOnlyLinear
from bellbox.ops import native
from bellbox.ops.decode_bytes import decode_bytes, operation

SETS = native.instruction_sets()


@pytest.mark.skipif(not SETS, reason="the compiled kernels were not built")
@pytest.mark.parametrize("codes", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(1, 1, 1), (3, 70, 1), (5, 64, 4), (130, 96, 3), (0, 8, 1)]
)
def test_the_same_bits_as_the_reference(codes, rows, columns, groups):
    packed = torch.randint(0, 256, (rows, -(-columns // codes)), dtype=torch.uint8)
    values, scale = torch.randn(256, codes), torch.rand(rows, groups)
    found = decode_bytes(packed, values, scale, columns)
    assert torch.equal(found, operation.reference(packed, values, scale, columns))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8, 16, 17, 256])
@pytest.mark.parametrize("group", [None, 6])
@pytest.mark.parametrize("table", [False, True])
def test_a_layer_decodes_what_its_codes_stand_for(n, group, table):
    grid, columns = Grid(n, 0.0), 42
    layer = WeightOnlyLinear(columns, 9, grid, False, group=group, table=table)
    codes = torch.randint(0, n, (9, columns), dtype=torch.uint8)
    layer.packed = packing.pack(codes, n)
    layer.weight_scale = torch.rand(layer.weight_scale.shape)
    if table:
        layer.weight_table = torch.randn(n)
    values = grid.decode(codes) if layer.weight_table is None else layer.weight_table[codes.int()]
    scale = (
        layer.weight_scale[:, None] if group is None else layer.weight_scale.repeat_interleave(group, dim=1)
    )
    assert torch.equal(layer.decoded_rows(), values * scale)
    x = torch.randn(3, columns)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, values * scale))
