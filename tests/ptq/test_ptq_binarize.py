from __future__ import annotations

import billm_reference as reference
import numpy as np
import pytest
import torch

from bellbox.core.binarize import binarize, decode, round_to_two
from bellbox.errors import BellboxError
from bellbox.ptq.feedback import binarize_matrix, output_error
from bellbox.ptq.hessian import InputStatistics, inverse_factor

VARIANTS = ["released", "clean"]


def problem(rows: int, columns: int, tokens: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-tailed weights, and inputs with outlier channels: `[rows, columns]`, `[tokens, columns]`."""
    random = np.random.default_rng(seed)
    w = random.standard_t(4, (rows, columns)) * random.lognormal(0, 0.4, columns)
    x = random.normal(size=(tokens, 6)) @ random.normal(size=(6, columns)) + random.normal(
        size=(tokens, columns)
    )
    x[:, :: max(1, columns // 5)] *= 6
    return w, x


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "columns"), [(7, 64), (5, 128), (3, 20), (1, 9), (4, 1)])
def test_a_block_is_binarized_as_brute_force_in_float64_does(variant, rows, columns):
    w, x = problem(rows, columns)
    diagonal = np.diag(reference.inverse_factor(x.T @ x / len(x), 0.01))
    made = binarize(torch.from_numpy(w), torch.from_numpy(diagonal.copy()), variant, torch.float64)
    torch.testing.assert_close(
        decode(made, torch.float64),
        torch.from_numpy(reference.binarize(w, diagonal, variant)),
        atol=1e-12,
        rtol=1e-12,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_up_to_49_columns_are_salient_and_no_more(variant):
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 128)))
    w[:, :60] *= 30  # all of these would be, if so many could
    salient = binarize(w, torch.ones(128, dtype=torch.float64), variant).salient
    assert salient is not None
    assert int(salient.sum()) == int(salient[:60].sum()) == 49


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("columns", [48, 50, 33])
def test_a_matrix_and_its_error_feedback_are_those_of_brute_force(variant, columns):
    w, x = problem(6, columns)
    upper = reference.inverse_factor(2 * x.T @ x / len(x), 0.01)
    _, made = binarize_matrix(torch.from_numpy(w), torch.from_numpy(upper.copy()), variant, 16, torch.float64)
    wanted = reference.matrix(w, upper, variant, 16)
    torch.testing.assert_close(made, torch.from_numpy(wanted), atol=1e-9, rtol=1e-9)


def test_the_hessian_and_its_factor_are_those_of_float64():
    _, x = problem(1, 40)
    x[:, 7] = 0  # dead
    seen = InputStatistics(40)
    for part in torch.from_numpy(x).float().reshape(4, 100, 40):
        seen.add(part.reshape(10, 10, 40))
    assert torch.equal(seen.largest, torch.from_numpy(np.abs(x).max(0)).float())
    hessian = seen.hessian()
    torch.testing.assert_close(hessian, torch.from_numpy(2 * x.T @ x / 400).float(), rtol=1e-4, atol=1e-3)
    upper = inverse_factor(hessian, 0.01, "layer")
    wanted = torch.from_numpy(reference.inverse_factor(2 * x.T @ x / 400, 0.01)).float()
    torch.testing.assert_close(upper * wanted.diagonal().sign(), wanted, rtol=1e-3, atol=1e-4)


def test_a_singular_hessian_is_named():
    seen = InputStatistics(8)
    seen.add(torch.ones(20, 8))
    with pytest.raises(BellboxError, match=r"o_proj: its Hessian is singular with damping 0") as caught:
        inverse_factor(seen.hessian(), 0.0, "o_proj")
    assert "\n" not in str(caught.value)
    seen = InputStatistics(8)
    seen.add(torch.full((20, 8), float("nan")))
    with pytest.raises(BellboxError, match="not finite"):
        inverse_factor(seen.hessian(), 0.01, "o_proj")


def test_feedback_and_groups_each_lower_the_error_of_the_output():
    w, x = problem(64, 256, tokens=2000)
    weight = torch.from_numpy(w).float()
    hessian = torch.from_numpy(2 * x.T @ x / len(x)).float()
    upper = inverse_factor(hessian, 0.01, "layer")
    errors = {"rtn": output_error(weight, binarize_matrix(weight, None)[1], hessian)}
    for variant in VARIANTS:
        errors[variant] = output_error(weight, binarize_matrix(weight, upper, variant)[1], hessian)
    alone = torch.cat(
        [decode(binarize(weight[:, at : at + 128], upper.diagonal()[at : at + 128])) for at in (0, 128)], 1
    )
    assert errors["clean"] < output_error(weight, alone, hessian) < errors["rtn"]
    assert errors["clean"] < errors["released"] < errors["rtn"]


def test_scales_are_rounded_before_the_error_is_fed_on():
    w, x = problem(6, 300)
    upper = inverse_factor(torch.from_numpy(x.T @ x).float(), 0.01, "layer")
    blocks, made = binarize_matrix(torch.from_numpy(w).float(), upper)
    assert [block.scales.dtype for block in blocks] == [torch.float16] * 3
    assert torch.equal(torch.cat([decode(block) for block in blocks], 1), made)


def test_rounding_to_nearest_has_two_levels_a_row():
    w = torch.tensor([[1.0, 3.0, -2.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    made = decode(round_to_two(w))
    assert made.tolist() == [[-0.5, 4.5, -0.5, 4.5], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_dead_and_constant_columns_do_no_harm(variant):
    w, x = problem(5, 64)
    w[:, 3], x[:, 3] = 0, 0
    w[:, 40:] = 0.25
    upper = inverse_factor(torch.from_numpy(x.T @ x).float(), 0.01, "layer")
    _, made = binarize_matrix(torch.from_numpy(w).float(), upper, variant)
    assert made.isfinite().all()
