from __future__ import annotations

import pytest
import torch

from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError
from bellbox.models import KVCache
from bellbox.ops.cache_codes import code_rows, decode_rows, head_block

PARTS = {"int8": 254, "int4": 15}
BOTH = pytest.mark.parametrize("precision", list(PARTS))


@BOTH
@pytest.mark.parametrize("head_dim", [1, 2, 7, 20, 64, 96, 128])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 300.0, 1e30])
def test_rows_of_any_size_are_right_to_half_a_step(precision: str, head_dim: int, size: float) -> None:
    x = torch.randn(200, head_dim) * size
    for block in (1, head_block(head_dim)):
        codes, scales = code_rows(x, precision, block)
        coded = decode_rows(codes, scales, head_dim, 1)
        meant = hadamard(x, block) if block > 1 else x
        largest = meant.abs().amax(-1, keepdim=True)
        assert bool(((coded - meant).abs() <= largest / PARTS[precision] * (1 + 1e-4)).all())
        # Rotating back keeps the norm of a row's error.
        error = (decode_rows(codes, scales, head_dim, block).double() - x.double()).norm(dim=-1)
        bound = (coded.double() - meant.double()).norm(dim=-1) + 1e-5 * x.double().norm(dim=-1)
        assert bool((error <= bound).all())


@BOTH
def test_zeros_are_exact_and_rows_do_not_see_each_other(precision: str) -> None:
    x = torch.randn(5, 64) * torch.tensor([1e-3, 0.0, 300.0, 1e-44, 1.0])[:, None]
    codes, scales = code_rows(x, precision, 64)
    y = decode_rows(codes, scales, 64, 64)
    assert y[1].tolist() == [0.0] * 64
    assert y[3].tolist() == [0.0] * 64
    for i in range(5):
        alone = code_rows(x[i : i + 1], precision, 64)
        assert torch.equal(alone[0], codes[i : i + 1])
        assert torch.equal(alone[1], scales[i : i + 1])
    sparse = torch.zeros(1, 64)
    sparse[0, 3] = 5.0
    assert decode_rows(*code_rows(sparse, precision, 1), 64, 1).tolist()[0][:3] == [0.0] * 3


@BOTH
def test_a_row_that_is_not_finite_stays_so(precision: str) -> None:
    x = torch.ones(3, 32)
    x[0, 4], x[1, 9] = float("nan"), float("-inf")
    y = decode_rows(*code_rows(x, precision, 32), 32, 32)
    assert bool(y[:2].isnan().all())
    assert y[2].tolist() == pytest.approx([1.0] * 32)


def test_the_bytes_of_four_bits() -> None:
    x = torch.tensor([[7.5, -8.0, 0.0, 1.0, -3.0]])
    codes, scales = code_rows(torch.cat((x, -x)), "int4", 1)
    assert codes.tolist() == [[9 << 4 | 15, 5 << 4 | 0, 8]] * 2
    assert scales.tolist() == [1.0, -1.0]  # the side that reaches farther gets the code more
    codes, scales = code_rows(torch.tensor([[7.5, -7.5, 0.0, 1.0, -3.0]]), "int4", 1)
    assert codes.tolist() == [[9 << 4 | 15, 5 << 4 | 0, 8]]  # 7.5 is coded 7, -7.5 (a tie) -8
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_bookkeeping(precision) -> None:
    batch, heads, size = 3, 2, 20
    keys, values = torch.randn(2, batch, heads, 12, size)
    whole = KVCache(2, batch, heads, 12, size, precision=precision)
    pieces = KVCache(2, batch, heads, 12, size, precision=precision)
    for cache in (whole, pieces):  # what an earlier text left behind
        cache.append(0, values, keys)
        cache.advance(12)
        with pytest.raises(BellboxError, match="cache is full"):
            cache.check_room(batch, 1)
        cache.reset()
        assert cache.length == 0
    expected = [whole.append(layer, keys * (layer + 1), values) for layer in range(2)]
    assert expected[0][0].shape == keys.shape
    at = 0
    for new in (5, 1, 4, 2):
        for layer in range(2):
            seen = pieces.append(layer, keys[:, :, at : at + new] * (layer + 1), values[:, :, at : at + new])
            for found, of in zip(seen, expected[layer], strict=True):
                assert torch.equal(found, of[:, :, : at + new])
        pieces.advance(new)
        at += new
    assert pieces.length == 12
    rows = 2 * 2 * batch * heads * 12  # layers, and keys and values
    row = {"fp32": 4 * size, "int8": size + 4, "int4": size // 2 + 4}[precision]
    assert whole.nbytes == rows * row
    with pytest.raises(BellboxError, match="batch of 3, not of 2"):
        whole.check_room(2, 1)


def test_another_precision_is_one_line() -> None:
    with pytest.raises(BellboxError, match="a KV cache in 'int3': it must be fp32, int8 or int4"):
        KVCache(1, 1, 1, 4, 8, precision="int3")  # pyright: ignore[reportArgumentType]
