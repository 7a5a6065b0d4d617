from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from bellbox.core.entropy import code_counts, entropy_bits
from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.ops.encode import SIGMA_FLOOR
from bellbox.quantizers import set_debug
from bellbox.quantizers.bbq import BBQ
from bellbox.recipe import QuantizerSpec

ROWS, FEATURES, BLOCK = 6, 48, 16
COUNTS = (2, 3, 4, 8, 16)
STATISTICS = ("row", "token", "ema", "tensor")
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}


def sylvester(block: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def formula(
    x: Tensor,
    gamma: Tensor,
    n: int,
    granularity: str,
    block: int = BLOCK,
    inverse: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    """The method as its description states it, in float64, every step left to autograd.

    `inverse` is a fixed 1/sigma. `codes` replaces the ones computed here (a value near a threshold may be coded
    differently from an fp32 input).
    """
    rows = x.reshape(-1, x.shape[-1]).double()
    rotated = (rows.reshape(len(rows), -1, block) @ sylvester(block) / math.sqrt(block)).reshape(rows.shape)
    if inverse is None:
        mean = (
            rotated.square().mean(-1, keepdim=True)
            if granularity in ("row", "token")
            else rotated.square().mean()
        )
        inverse = 1 / mean.sqrt().clamp(min=1e-8)
    v = rotated * inverse
    box = n * 0.5 * torch.erfc(-v / math.sqrt(2))
    if codes is None:
        codes = box.detach().floor().clamp(0, n - 1)
    zero_point = -0.5 if n < 8 else 0.0
    level = (
        box + (codes.reshape(box.shape) - box).detach() - n / 2 - zero_point
    )  # straight through the rounding
    gradient_scale = 1 / math.sqrt(rows.numel())
    gamma = gamma.double()
    gamma = gamma * gradient_scale + (gamma * (1 - gradient_scale)).detach()
    return (gamma / (n / 2) * level).reshape(x.shape)


def quantizer(
    granularity: str, n: int = 4, features: int = FEATURES, block: int = BLOCK, rows: int = ROWS
) -> BBQ:
    spec = QuantizerSpec(levels=n, granularity=granularity, block=block)  # type: ignore[arg-type]
    return BBQ(features, spec, rows if granularity == "row" else None)


def some_input(dtype: torch.dtype = torch.float32, seed: int = 0, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    return (x * torch.linspace(0.2, 3, rows, dtype=torch.float64)[:, None]).to(dtype)


def bell(q: BBQ, x: Tensor) -> Tensor:
    """The normalised value, float64, to see what lies near a threshold."""
    rows = x.reshape(-1, x.shape[-1]).double()
    rotated = (rows.reshape(len(rows), -1, q.block) @ sylvester(q.block) / math.sqrt(q.block)).reshape(
        rows.shape
    )
    mean = (
        rotated.square().mean(-1, keepdim=True)
        if q.granularity in ("row", "token")
        else rotated.square().mean()
    )
    return rotated / mean.sqrt()


def run(q: BBQ, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    q.zero_grad()
    out = q(x)
    (out.double() * weights).sum().backward()
    assert x.grad is not None
    assert q.gamma.grad is not None
    return out.detach(), x.grad, q.gamma.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("granularity", STATISTICS)
@pytest.mark.parametrize("n", COUNTS)
def test_forward_and_gradients_are_those_of_the_formula(n, granularity, dtype):
    q = quantizer(granularity, n).to(torch.float64 if dtype == torch.float64 else torch.float32)
    q.initialize(some_input(seed=9))
    with torch.no_grad():
        q.gamma.mul_(torch.linspace(0.5, 2, q.gamma.numel(), dtype=q.gamma.dtype).reshape(q.gamma.shape))
    x = some_input(dtype)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, g_x, g_gamma = run(q, x, weights)

    codes = (out.double() / (q.gamma.detach().double() / (n / 2)) + n / 2 + (-0.5 if n < 8 else 0.0)).round()
    v = bell(q, x)
    near = (v[..., None] - torch.tensor(Levels.gaussian(n).thresholds, dtype=torch.float64)).abs().amin(
        -1
    ) < 1e-5
    mine = Levels.gaussian(n).encode(v).double()
    assert torch.equal(codes[~near], mine[~near])
    assert near.float().mean() < 0.01

    wide = x.double().requires_grad_()
    gamma = q.gamma.detach().double().requires_grad_()
    expected = formula(wide, gamma, n, granularity, codes=codes)
    (expected * weights).sum().backward()
    bound = ROUNDING[dtype]
    assert gamma.grad is not None
    assert wide.grad is not None
    for ours, theirs in ((out, expected.detach()), (g_x, wide.grad), (g_gamma, gamma.grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound * float(theirs.abs().max()))
    assert g_x.dtype == dtype


@pytest.mark.parametrize("granularity", STATISTICS)
@pytest.mark.parametrize("n", [2, 4, 16])
def test_bf16_autocast_keeps_fp32_codes_and_gradients_within_bf16(n, granularity):
    q = quantizer(granularity, n)
    x = some_input()
    q.initialize(x)
    weights = (
        torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        .to(torch.bfloat16)
        .double()
    )
    exact, g_x, g_gamma = run(q, x, weights)
    with torch.autocast("cpu", torch.bfloat16):
        out, low_g_x, low_g_gamma = run(q, x, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))  # the very codes of fp32, rounded once
    # v is kept in bf16 (2^-9 relative): phi(v) moves by v^2 2^-9, the gradient by a few such terms.
    for low, high in ((low_g_x, g_x), (low_g_gamma, g_gamma)):
        assert low.dtype == torch.float32
        assert (low - high).norm() <= 0.01 * high.norm()
        assert (low - high).abs().max() <= 0.03 * high.abs().max()


def test_a_bf16_tensor_is_computed_in_fp32():
    q = quantizer("token", 16)
    x = some_input().to(torch.bfloat16)
    q.initialize(x)
    assert torch.equal(q.codes(x), q.codes(x.float()))
    assert q(x).dtype == torch.bfloat16


@pytest.mark.parametrize("granularity", STATISTICS)
def test_the_gradient_of_gamma_is_divided_by_the_root_of_the_number_of_elements(granularity):
    q = quantizer(granularity)
    x = some_input()
    q.initialize(x)
    weights = torch.ones(ROWS, FEATURES, dtype=torch.float64)
    out, _, g_gamma = run(q, x, weights)
    plain = out / q.gamma.detach()
    plain = plain.sum(-1, keepdim=True) if granularity == "row" else plain.sum().reshape(1)
    torch.testing.assert_close(g_gamma, plain / math.sqrt(ROWS * FEATURES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["row", "token", "tensor"])
def test_below_the_floor_sigma_is_a_constant(granularity):
    q = quantizer(granularity).double()
    q.initialize(some_input())
    x = some_input(torch.float64) * 1e-10
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, g_x, _ = run(q, x, weights)
    wide = x.clone().requires_grad_()
    expected = formula(
        wide, q.gamma.detach(), 4, granularity, inverse=torch.tensor(1 / SIGMA_FLOOR, dtype=torch.float64)
    )
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g_x, wide.grad, rtol=1e-12, atol=0.0)
    assert SIGMA_FLOOR == 1e-8


def test_the_gradient_is_orthogonal_to_the_input():
    q = quantizer("token").double()
    x = some_input(torch.float64)
    q.initialize(x)
    _, g_x, _ = run(q, x, torch.randn(x.shape, dtype=torch.float64))
    assert (g_x * x).sum(-1).abs().max() < 1e-12 * g_x.abs().max()


def test_in_evaluation_no_gradient_flows_through_a_running_scale():
    q = quantizer("ema").double()
    q(some_input(torch.float64, seed=3))
    q.eval()
    x = some_input(torch.float64)
    weights = torch.randn(x.shape, dtype=torch.float64)
    out, g_x, _ = run(q, x, weights)
    wide = x.clone().requires_grad_()
    expected = formula(wide, q.gamma.detach(), 4, "ema", inverse=q.r_ema.double())
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g_x, wide.grad, rtol=1e-10, atol=1e-12)


def naive_codes(x: Tensor, levels: Levels, block: int) -> list[list[int]]:
    """Codes of rows one value at a time, in Python numbers and single fp32 operations."""
    codes = []
    for row in x.tolist():
        sigma = max(math.sqrt(sum(value * value for value in row) / len(row)), 1e-8)
        r = torch.tensor(1 / (sigma * math.sqrt(block)), dtype=torch.float64).to(torch.float32)
        values, h = torch.tensor(row), 1
        while h < block:
            pairs = values.view(-1, 2, h)
            values = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).view(-1)
            h *= 2
        codes.append([sum(v >= t for t in levels.thresholds) for v in (values * r).tolist()])
    return codes


@pytest.mark.parametrize("n", COUNTS)
def test_forward_encode_and_a_naive_loop_agree_on_every_code(n):
    x = some_input(rows=9)
    q = quantizer("token", n)
    out = q(x)
    codes, row_scale = q.encode(x)
    assert codes.tolist() == naive_codes(x, q.levels, BLOCK)
    assert torch.equal(out, q.levels.decode(codes) * q.scale())
    assert row_scale.eq(1).all()
    row = quantizer("row", n, rows=9)
    row.initialize(x)
    assert torch.equal(row.codes(x), codes)
    assert torch.equal(row(x), row.levels.decode(codes) * row.scale())


@pytest.mark.parametrize("granularity", STATISTICS)
def test_values_on_a_threshold_go_up_in_forward_and_encode(granularity):
    q = quantizer(granularity, 4, features=4, block=1, rows=2)
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0], [1.0, 1.0, -1.0, 0.0]])
    q.initialize(x)
    codes = q.codes(x)
    zeros = x == 0
    assert codes[zeros].eq(2).all()
    assert torch.equal(q(x), q.levels.decode(codes) * q.scale())


@pytest.mark.parametrize("granularity", STATISTICS)
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 1e-30, 1e25])
def test_constant_and_extreme_inputs_stay_finite(granularity, value):
    q = quantizer(granularity)
    q.initialize(some_input())
    x = torch.full((ROWS, FEATURES), value)
    x[0, ::2] *= -1
    out, g_x, g_gamma = run(q, x, torch.ones(ROWS, FEATURES, dtype=torch.float64))
    assert out.isfinite().all()
    assert g_x.isfinite().all()
    assert g_gamma.isfinite().all()
    assert q.eval()(x).isfinite().all()


@pytest.mark.parametrize("granularity", ["token", "ema", "tensor"])
def test_a_single_row_and_no_row(granularity):
    q = quantizer(granularity)
    one = some_input(rows=1)
    out, g_x, _ = run(q, one, torch.ones(1, FEATURES, dtype=torch.float64))
    assert out.isfinite().all()
    assert g_x.isfinite().all()
    for mode in (True, False):
        assert q.train(mode)(one[:0]).shape == (0, FEATURES)
        assert q.codes(one[:0]).shape == (0, FEATURES)
    assert torch.equal(q(one[0]), q(one)[0])


@pytest.mark.parametrize("granularity", STATISTICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("training", [True, False])
def test_a_non_finite_value_makes_its_normalisation_group_nan(granularity, bad, training):
    q = quantizer(granularity).train(training)
    q.initialize(some_input())
    x = some_input()
    x[2, :] = bad if bad == 3e38 else x[2, :]  # finite, but its rotation overflows
    x[2, 5] = bad
    out = q(x)
    whole = granularity == "tensor" or (granularity == "ema" and training)
    assert out[2].isnan().all()
    others = torch.arange(ROWS) != 2
    assert out[others].isnan().all() if whole else out[others].isfinite().all()
    _, row_scale = q.encode(x)
    whole = granularity == "tensor"
    assert row_scale[2].isnan().all()
    assert row_scale[others].isnan().all() if whole else row_scale[others].eq(1).all()
    if granularity == "ema":
        assert q.r_ema.isfinite()


def test_debug_mode_names_the_quantizer(request):
    request.addfinalizer(lambda: set_debug(False))
    set_debug(True)
    q = quantizer("token")
    q.name = "model.layers.3.self_attn.q_proj.input"
    x = some_input()
    q(x)
    q(x[:0])
    x[0, 0] = math.nan
    for call in (q, q.encode, q.eval()):
        with pytest.raises(BellboxError, match=r"layers\.3\.self_attn\.q_proj\.input.*NaN"):
            call(x)


def test_the_running_scale_is_an_average_of_the_inverse_of_the_batches():
    q = quantizer("ema").double()
    inverses = []
    for seed in range(5):
        x = some_input(torch.float64, seed) * (seed + 1)
        q(x)
        inverses.append(float(1 / x.square().mean().sqrt()))
    expected = inverses[0]
    for inverse in inverses:
        expected = 0.99 * expected + 0.01 * inverse
    assert float(q.r_ema) == pytest.approx(expected, rel=1e-12)
    x = some_input(torch.float64, 7)
    training = q(x)
    before = q.r_ema.clone()
    q.eval()
    static = q(x * 3)
    assert torch.equal(q.r_ema, before)
    assert torch.equal(static, q.levels.decode(q.codes(x * 3), torch.float64) * q.gamma / 2)
    torch.testing.assert_close(training, formula(x, q.gamma.detach(), 4, "tensor"))


def test_a_static_scale_sees_each_row_alone():
    q = quantizer("ema")
    q(some_input())
    x = some_input(seed=4)
    assert torch.equal(q.codes(x)[1:2], q.codes(x[1:2]))


@pytest.mark.parametrize("granularity", STATISTICS)
def test_the_first_batch_sets_gamma_in_training_evaluation_and_encoding(granularity):
    x = some_input()
    expected = 1.694 * float(x.double().square().mean().sqrt())
    for use in (lambda q: q(x), lambda q: q.eval()(x), lambda q: q.encode(x)):
        q = quantizer(granularity)
        assert not q.is_set
        with torch.no_grad():
            use(q)
        assert q.is_set
        assert q.gamma.detach().flatten().tolist() == pytest.approx([expected] * q.gamma.numel())
        q(100 * x)
        assert float(q.gamma.detach().flatten()[0]) == pytest.approx(expected)


def test_a_dead_or_broken_first_batch_is_not_the_first_batch():
    q = quantizer("ema")
    q(torch.zeros(2, FEATURES))
    q(torch.full((2, FEATURES), math.nan))
    assert not q.is_set
    q(some_input())
    assert q.is_set
    assert q.r_ema.isfinite()


@pytest.mark.parametrize("granularity", STATISTICS)
def test_initialisation_is_state(granularity):
    q, fresh = quantizer(granularity), quantizer(granularity)
    x = some_input()
    q(x)
    fresh.load_state_dict(q.state_dict())
    assert fresh.is_set
    fresh(5 * x)  # must not initialise again
    assert torch.equal(fresh.gamma, q.gamma)
    clone = copy.deepcopy(q)
    assert torch.equal(clone.eval()(x), q.eval()(x))
    blank = quantizer(granularity)
    q.load_state_dict(blank.state_dict())
    assert not q.is_set
    q.train()(2 * x)
    expected = 1.694 * float((2 * x).double().square().mean().sqrt())
    assert float(q.gamma.detach().flatten()[0]) == pytest.approx(expected)


def test_a_leading_shape_is_kept():
    q = quantizer("token")
    x = some_input().view(2, 3, FEATURES)
    assert torch.equal(q(x), q(x.view(6, FEATURES)).view(x.shape))
    codes, row_scale = q.encode(x)
    assert codes.shape == x.shape
    assert row_scale.shape == (2, 3, 1)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3), torch.zeros(2, FEATURES, dtype=torch.int64), torch.tensor(1.0)]
)
def test_an_input_of_the_wrong_shape_or_dtype_is_refused(bad):
    with pytest.raises(BellboxError, match=f"last dimension {FEATURES}"):
        quantizer("token")(bad)


def test_a_statistic_that_does_not_fit_its_role_is_refused():
    for granularity, rows in (("row", None), ("token", 4), ("channel", None)):
        with pytest.raises(BellboxError, match="granularity"):
            BBQ(8, QuantizerSpec(granularity=granularity, block=8), rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_is_saved_for_backward_than_the_output_and_one_tensor_of_its_size(autocast):
    q = BBQ(256, QuantizerSpec())
    x = torch.randn(128, 256, requires_grad=True)
    q(x.detach())
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = q(x)
    large = {t.data_ptr(): t for t in saved if t.numel() > 2 * len(x)}
    assert out.data_ptr() in large  # what the matrix product keeps anyway
    assert len(large) == 2
    assert all(t.nbytes == out.nbytes <= x.nbytes for t in large.values())


@pytest.mark.parametrize(("n", "block"), list(itertools.product(COUNTS, (1, 128))))
def test_gaussian_weights_use_all_of_their_bits(n, block):
    weight = 0.02 * torch.randn(2048, 1024, generator=torch.Generator().manual_seed(n))
    q = BBQ(1024, QuantizerSpec(levels=n, block=block), 2048)
    assert entropy_bits(code_counts(q.codes(weight), n)) == pytest.approx(math.log2(n), abs=1e-3)


def test_rotation_recovers_the_bits_of_heavy_tailed_activations():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator) / torch.rand(512, 1024, generator=generator).pow(0.75)
    rotated, plain = (
        entropy_bits(code_counts(BBQ(1024, QuantizerSpec(levels=16, block=block)).codes(x), 16))
        for block in (128, 1)
    )
    assert plain < 3.3
    assert rotated > plain + 0.3
