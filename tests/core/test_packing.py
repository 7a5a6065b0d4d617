from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bellbox.core.packing import code_width, digits_per_byte, pack, row_bytes, unpack, unpack_slabs
from bellbox.errors import BellboxError

# n levels, one row of codes, its bytes worked out by hand.
WORKED = [
    (2, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b10001101, 0b00000001]),
    (4, [1, 2, 3, 0, 3, 1], [0b00_11_10_01, 0b00_00_01_11]),
    (8, [1, 2, 3, 4, 5, 6, 7, 0, 5], [0b11_010_001, 0b0_101_100_0, 0b000_111_11, 0b00000_101]),
    (16, [1, 15, 8, 0, 7], [0xF1, 0x08, 0x07]),
    (3, [0, 1, 2, 0, 1, 2, 2], [0 + 1 * 3 + 2 * 9 + 0 * 27 + 1 * 81, 2 + 2 * 3]),
    (256, [0, 255, 7], [0, 255, 7]),
    (6, [5, 0, 1, 2], [5 + 0 * 6 + 1 * 36, 2]),
]


@pytest.mark.parametrize(("n", "codes", "bytes_"), WORKED)
def test_bytes_of_a_row(n, codes, bytes_):
    packed = pack(torch.tensor([codes, codes[::-1]], dtype=torch.uint8), n)
    assert packed.dtype == torch.uint8
    assert packed[0].tolist() == bytes_
    assert packed.shape[1] == row_bytes(len(codes), n)
    assert unpack(packed, len(codes), n).tolist() == [codes, codes[::-1]]


def naive_bits(codes: list[int], width: int) -> list[int]:
    number = sum(code << (width * i) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * width // 8), "little"))


def naive_digits(codes: list[int], n: int, digits: int) -> list[int]:
    groups = [codes[i : i + digits] for i in range(0, len(codes), digits)]
    return [sum(code * n**i for i, code in enumerate(group)) for group in groups]


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 256), st.integers(1, 5), st.integers(1, 70), st.data())
def test_round_trip_and_layout_by_definition(n, rows, columns, data):
    row = st.lists(st.integers(0, n - 1), min_size=columns, max_size=columns)
    codes = data.draw(st.lists(row, min_size=rows, max_size=rows))
    tensor = torch.tensor(codes, dtype=torch.uint8).reshape(rows, columns)
    packed = pack(tensor, n)
    digits = digits_per_byte(n)
    expected = [naive_digits(c, n, digits) if digits else naive_bits(c, code_width(n)) for c in codes]
    assert packed.tolist() == expected
    assert packed.shape == (rows, row_bytes(columns, n))
    assert torch.equal(unpack(packed, columns, n), tensor)


def test_the_denser_layout_is_taken():
    assert {n: d for n in range(2, 257) if (d := digits_per_byte(n))} == {3: 5, 5: 3, 6: 3}
    for n in range(2, 257):
        digits = digits_per_byte(n)
        per_code = 8 / digits if digits else code_width(n)
        assert per_code <= code_width(n)
        assert digits is None or n**digits <= 256 < n ** (digits + 1)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 200])
def test_a_code_out_of_range_is_refused(n):
    with pytest.raises(BellboxError, match=f"code {n} cannot be packed"):
        pack(torch.full((1, 3), n, dtype=torch.uint8), n)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (4,), (1, 2, 2)])
def test_a_row_of_the_wrong_length_is_refused(shape):
    with pytest.raises(BellboxError, match="expected 2 bytes a row"):
        unpack(torch.zeros(shape, dtype=torch.uint8), 8, 4)


def test_impossible_bytes_show_as_codes_out_of_range():
    assert int(unpack(torch.tensor([[243]], dtype=torch.uint8), 5, 3).max()) >= 3
    assert int(unpack(torch.tensor([[7, 0, 0]], dtype=torch.uint8), 8, 7).max()) >= 7
    for byte in range(243):
        assert int(unpack(torch.tensor([[byte]], dtype=torch.uint8), 5, 3).max()) < 3


@pytest.mark.parametrize("n", [3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "codes", "sizes"),
    [
        (300, 7, 1000, [128, 128, 44]),
        (300, 7, 1009, [144, 144, 12]),
        (40, 7, 10, [16, 16, 8]),
        (5, 7, 1000, [5]),
    ],
)
def test_slabs_are_the_rows_in_their_order_sixteen_or_a_multiple_at_a_time(n, rows, columns, codes, sizes):
    whole = torch.randint(n, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    slabs = list(unpack_slabs(pack(whole, n), columns, n, codes))
    assert [len(slab) for slab in slabs] == sizes
    assert torch.equal(torch.cat(slabs), whole)


def test_a_slab_has_a_quarter_of_a_million_codes():
    packed = torch.zeros(130, row_bytes(4096, 4), dtype=torch.uint8)
    assert [len(slab) for slab in unpack_slabs(packed, 4096, 4)] == [64, 64, 2]
