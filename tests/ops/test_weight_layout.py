"""The one tensor that weight codes lie in: in torch and in the compiled kernels."""

from __future__ import annotations

import pytest
import torch

from bellbox.errors import BellboxError
from bellbox.ops import native
from bellbox.ops.weight_layout import (
    packed_size,
    prepack,
    prepack_operation,
    prepack_slabs,
    unpack,
    unpack_operation,
)

LEVELS = [*range(2, 17), 255]
SHAPES = [(1, 1), (5, 7), (16, 64), (17, 65), (33, 130), (48, 9), (15, 576), (100, 63)]


def codes_of(rows: int, columns: int, levels: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows * columns)
    return torch.randint(0, levels, (rows, columns), dtype=torch.uint8, generator=draw)


@pytest.mark.parametrize("places", [1, 9])
@pytest.mark.parametrize("levels", LEVELS)
def test_torch_and_kernels_agree_and_are_inverse(levels, places, monkeypatch):
    isas = native.instruction_sets() if levels <= 16 else []
    for rows, columns in SHAPES:
        columns *= places
        codes = codes_of(rows, columns, levels)
        packed = prepack_operation.reference(codes, levels, places)
        assert packed.shape == (packed_size(rows, columns, levels, places),)
        assert torch.equal(unpack_operation.reference(packed, rows, columns, levels), codes)
        for isa in isas:
            with native.use(isa):
                monkeypatch.setenv("BELLBOX_BACKEND", "cpu")
                assert torch.equal(prepack(codes, levels, places), packed), (rows, columns, isa)
                assert torch.equal(unpack(packed, rows, columns, levels), codes), (rows, columns, isa)
                monkeypatch.delenv("BELLBOX_BACKEND")
        assert torch.equal(prepack(codes, levels, places), packed)
        for slab in (16, 32, 112):
            found = prepack_slabs(codes.split(slab), rows, columns, levels, places)
            assert torch.equal(found, packed), (rows, columns, slab)


@pytest.mark.parametrize("levels", LEVELS)
def test_strided_codes_and_packed_views_are_read_as_their_copies(levels):
    codes = codes_of(33, 130, levels)
    packed = prepack(codes, levels)
    assert torch.equal(prepack(codes.t().contiguous().t(), levels), packed)
    wide = torch.stack((packed, packed.bitwise_not()), -1)
    assert torch.equal(unpack(wide[:, 0], 33, 130, levels), codes)
    assert torch.equal(unpack(torch.cat((packed, packed)), 33, 130, levels), codes)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_what_is_no_matrix_of_codes_is_refused(backend, monkeypatch):
    monkeypatch.setenv("BELLBOX_BACKEND", backend)
    good = codes_of(4, 18, 4)
    for codes, places in ((good.int(), 1), (good[0], 1), (good, 4), (good, 0), (good, -1), (good | 8, 1)):
        with pytest.raises(BellboxError):
            prepack(codes, 4, places)
    with pytest.raises(BellboxError, match="codes of 18 columns have no 4 places"):
        prepack_operation.reference(good, 4, 4)
    for levels in (1, 0, -3, 257):
        with pytest.raises(BellboxError):
            prepack(good, levels)
    packed = prepack(good, 4)
    for weight, rows, columns, levels in (
        (packed[:-1], 4, 18, 4), (packed, 17, 18, 4), (packed, 4, 18, 16), (packed.view(2, -1), 4, 18, 4),
        (packed, -4, 18, 4), (packed, 4, -18, 4), (packed, 4, 0, 4), (packed.view(torch.int8), 4, 18, 4),
        (packed, 4, 18, 300),
    ):  # fmt: skip
        with pytest.raises(BellboxError):
            unpack(weight, rows, columns, levels)
        with pytest.raises(BellboxError):
            unpack_operation(weight, rows, columns, levels)
