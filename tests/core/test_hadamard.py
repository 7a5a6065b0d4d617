from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from bellbox.core import hadamard as hadamard_module
from bellbox.core.hadamard import block_size, butterfly, butterfly_between, hadamard, hadamard_matrix
from bellbox.errors import BellboxError

BLOCKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]


def sylvester(block: int) -> torch.Tensor:
    """By its definition: H(2k) = [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@pytest.mark.parametrize("block", BLOCKS)
def test_butterfly_is_the_sylvester_matrix_block_by_block(block):
    x = torch.randn(3, 5 * block, dtype=torch.float64)
    expected = (x.view(3, 5, block) @ sylvester(block)).view(3, -1)
    torch.testing.assert_close(butterfly(x, block), expected, rtol=0, atol=1e-12 * block)
    assert torch.equal(hadamard_matrix(block, torch.float64), sylvester(block))


@pytest.mark.parametrize("block", BLOCKS)
def test_orthonormal_and_its_own_inverse(block):
    x = torch.randn(4, 2 * block, dtype=torch.float64)
    rotated = hadamard(x, block)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(rotated, block), x)


def fixed_order(row: list[float], block: int) -> list[float]:
    """The additions in their order, one at a time, each rounded to fp32: what another backend has to do."""
    values, h = torch.tensor(row, dtype=torch.float32), 1
    while h < block:
        nxt = values.clone()
        for start in range(0, len(values), 2 * h):
            for i in range(start, start + h):
                nxt[i], nxt[i + h] = values[i] + values[i + h], values[i] - values[i + h]
        values, h = nxt, 2 * h
    return values.tolist()


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 128])
def test_additions_are_done_in_the_documented_order(block):
    x = torch.randn(256) * torch.logspace(-6, 6, 256)
    assert butterfly(x, block).tolist() == fixed_order(x.tolist(), block)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b > 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_give_the_same_bits(block, dtype):
    generator = torch.Generator().manual_seed(block)
    for rows in (1, 3, 17):
        x = torch.randn(rows, 3 * block, generator=generator, dtype=dtype)
        x *= torch.exp(
            8 * torch.randn(x.shape, generator=generator, dtype=dtype)
        )  # wide range: order matters
        x[0, ::3] = 0.0
        x[0, 1] = 1e-42  # a denormal in fp32
        before = x.clone()
        scratch = (torch.full_like(x, torch.nan), torch.full_like(x, torch.nan))
        assert torch.equal(butterfly_between(x, block, scratch), butterfly(x, block))
        assert torch.equal(x, before)


def test_a_rows_bits_do_not_depend_on_the_other_rows():
    x = torch.randn(37, 256)
    whole = butterfly(x, 128)
    for i in (0, 5, 36):
        assert torch.equal(butterfly(x[i : i + 1], 128), whole[i : i + 1])


def test_gradient():
    assert torch.autograd.gradcheck(
        lambda x: hadamard(x, 8), torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    )


def test_error_against_float64_is_at_most_twice_that_of_the_matrix_product():
    x = torch.randn(64, 1024)
    exact = butterfly(x.double(), 128)
    ours = (butterfly(x, 128) - exact).abs().max()
    naive = ((x.view(64, 8, 128) @ sylvester(128).float()).view(64, -1) - exact).abs().max()
    assert ours <= 2 * naive


@pytest.mark.parametrize(
    ("features", "largest", "block"),
    [(640, 128, 128), (1792, 128, 128), (48, 128, 16), (172, 128, 4), (96, 32, 32), (6, 128, 2), (64, 1, 1)],
)
def test_block_is_the_largest_power_of_two_that_divides(features, largest, block):
    assert block_size(features, largest) == block


def test_a_prime_size_works_and_says_so_once():
    with pytest.warns(UserWarning, match="10007 features"):
        assert block_size(10007) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert block_size(10007) == 1
    x = torch.randn(2, 7)
    assert torch.equal(hadamard(x, 1), x)


@pytest.mark.parametrize(("features", "says"), [(1, "one input channel a group"), (10009, "10009 features")])
def test_what_cannot_be_rotated_is_said_at_the_callers_line(features, says, monkeypatch):
    monkeypatch.setattr(hadamard_module, "_warned", set())
    with pytest.warns(UserWarning, match=says) as caught:
        assert block_size(features) == 1
    assert [Path(warning.filename).name for warning in caught] == ["test_hadamard.py"]


@pytest.mark.parametrize(("features", "largest"), [(64, 0), (64, 96), (64, -2), (0, 128)])
def test_impossible_blocks_are_refused(features, largest):
    with pytest.raises(BellboxError):
        block_size(features, largest)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_view_at_any_offset_is_rotated(offset):
    x = torch.randn(3 * 64 + offset)[offset:].view(3, 64)
    scratch = torch.empty_like(x), torch.empty_like(x)
    assert torch.equal(butterfly_between(x, 32, scratch), butterfly(x, 32))
