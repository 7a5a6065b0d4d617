from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bellbox.core.table import TableCodes, table_values
from bellbox.errors import BellboxError
from bellbox.ops import native
from bellbox.ops.decoder_block import head, last_norm
from bellbox.ops.int4_linear import int4_linear
from bellbox.ops.int8_linear import int8_linear
from bellbox.ops.rms_norm import rms_norm
from bellbox.ops.table_rows import operation as rows_operation
from bellbox.ops.table_rows import table_rows

SETS = native.instruction_sets()


@pytest.fixture(params=SETS or ["none"])
def isa(request):
    if not SETS:
        pytest.skip("the compiled kernels were not built")
    with native.use(request.param):
        yield request.param


def int8_table(rows: int, columns: int) -> TableCodes:
    return TableCodes(
        torch.randint(-127, 128, (rows, columns), dtype=torch.int8), None, torch.rand(rows) + 0.01
    )


def int4_table(rows: int, columns: int, group: int) -> TableCodes:
    return TableCodes(
        torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        torch.randint(0, 256, (rows, columns // group), dtype=torch.uint8),
        torch.rand(rows) + 0.01,
    )


@pytest.mark.parametrize("group", [None, 32, 64])
def test_rows_of_a_table_have_the_same_bits_on_every_path(isa, group):
    for rows, blocks, shape in (
        (1, 1, (1,)),
        (70, 10, (1, 1)),
        (7, 3, (5, 9)),
        (5, 2, (0,)),
        (3000, 5, (4000,)),
    ):
        columns = 64 * blocks
        codes = int4_table(rows, columns, group) if group else int8_table(rows, columns)
        ids = torch.randint(0, rows, shape)
        found = table_rows(ids, codes)
        assert torch.equal(found, table_values(codes)[ids])
        assert torch.equal(found.view(torch.int32), rows_operation.reference(ids, *codes).view(torch.int32))


def test_a_row_that_is_none_is_refused_and_a_compiler_sees_through(isa):
    for codes in (int8_table(5, 64), int4_table(5, 64, 32)):
        for wrong in (5, -1):
            with pytest.raises(BellboxError, match="outside of the embedding's 5 rows"):
                table_rows(torch.tensor([0, wrong]), codes)
        ids = torch.tensor([[4, 0, 4]])
        traced = make_fx(partial(table_rows, codes=codes))(ids)
        assert "bellbox" not in traced.code
        assert torch.equal(traced(ids), table_rows(ids, codes))


def test_a_bound_norm_and_head_are_those_of_each_call(isa):
    x, gain = torch.randn(3, 1, 64), torch.randn(64)
    assert torch.equal(last_norm(gain, 1e-5)(x), rms_norm(x, gain, 1e-5))
    int8, int4 = int8_table(7, 64), int4_table(7, 64, 32)
    assert torch.equal(head(int8)(x), int8_linear(x, int8.weight, int8.scale))
    assert torch.equal(head(int4)(x), int4_linear(x, *int4))
