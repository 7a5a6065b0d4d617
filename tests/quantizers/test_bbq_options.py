"""What the ablations and studies change in BBQ, against its definition in float64 under autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.core.entropy import code_counts, entropy_bits
from bellbox.core.grid import Levels
from bellbox.core.hadamard import hadamard
from bellbox.ops import native
from bellbox.quantizers import build_quantizer
from bellbox.quantizers.bbq import BBQ, optimal_gamma
from bellbox.recipe import QuantizerSpec, Recipe

ROWS, FEATURES, BLOCK = 5, 48, 16


def bbq(
    n: int = 4, granularity: str | None = None, rows: int | None = None, **options: bool | float | str
) -> BBQ:
    spec = QuantizerSpec("bbq", n, None, granularity, BLOCK, options)  # type: ignore[arg-type]
    q = build_quantizer(spec, FEATURES, rows, "here")
    assert isinstance(q, BBQ)
    return q


def data(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.3, 2, ROWS, dtype=torch.float64)[:, None]


def soft_level(v: Tensor, n: int, zero_point: float) -> Tensor:
    box = n * 0.5 * torch.erfc(-v / math.sqrt(2))
    return box + (box.detach().floor().clamp(0, n - 1) - box).detach() - n / 2 - zero_point


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("n", [2, 4, 16])
def test_a_fixed_zeta_follows_sigma_and_its_gradient_does_too(n, granularity):
    q = bbq(n, granularity, zeta=2.45).double()
    assert not list(q.parameters())
    x, g = data().requires_grad_(), data(1)
    out = q(x)
    (ours,) = torch.autograd.grad(out, x, g)
    wide = data().requires_grad_()
    mean = wide.square().mean(-1, keepdim=True) if granularity == "token" else wide.square().mean()
    sigma = mean.sqrt()
    expected = 2.45 * sigma / (n / 2) * soft_level(hadamard(wide, BLOCK) / sigma, n, 0.0 if n == 16 else -0.5)
    (theirs,) = torch.autograd.grad(expected, wide, g)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_weights_sigma_may_be_that_of_the_whole_tensor():
    q = bbq(4, "tensor", ROWS).double()
    q.initialize(data(2))
    assert q.gamma.shape == (ROWS, 1)
    x, g = data().requires_grad_(), data(1)
    ours = torch.autograd.grad(q(x), [x, q.gamma], g)
    wide, gamma = data().requires_grad_(), q.gamma.detach().clone().requires_grad_()
    v = hadamard(wide, BLOCK) / wide.square().mean().sqrt()
    theirs = torch.autograd.grad(gamma / 2 * soft_level(v, 4, -0.5), [wide, gamma], g)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1] / math.sqrt(data().numel()))
    assert q.why_not_packed() is None


def test_without_rms_the_rotated_value_itself_is_boxed():
    q = bbq(4, rms=False).double()
    x, g = data().requires_grad_(), data(1)
    out = q(x)
    (ours,) = torch.autograd.grad(out, x, g)
    wide = data().requires_grad_()
    expected = q.gamma.detach() / 2 * soft_level(hadamard(wide, BLOCK), 4, -0.5)
    (theirs,) = torch.autograd.grad(expected, wide, g)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ours, theirs)


def test_a_frozen_gamma_is_not_trained():
    q = bbq(gamma="frozen", gamma_init=1.5)
    x = data().float().requires_grad_()
    q(x).sum().backward()
    assert not q.gamma.requires_grad
    assert q.gamma.grad is None
    assert x.grad is not None
    assert float(q.gamma) == pytest.approx(1.5 * float(data().square().mean().sqrt()))


@pytest.mark.parametrize(
    ("n", "zero_point", "best"),
    [
        (2, -0.5, 1.596),
        (4, -0.5, 1.655),
        (8, 0.0, 1.603),
        (16, 0.0, 1.669),
        (8, -0.5, 1.680),
        (256, -0.5, 3 / math.pi**0.5),
    ],
)
def test_the_gamma_of_least_squared_error(n, zero_point, best):
    levels = Levels.gaussian(n, zero_point)
    assert optimal_gamma(levels) == pytest.approx(best, abs=1.1e-3)
    v = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    level = levels.decode(levels.encode(v)) / (n / 2)
    errors = [float((scale * optimal_gamma(levels) * level - v).square().mean()) for scale in (0.97, 1, 1.03)]
    assert errors[1] == min(errors)


def test_optimal_is_a_start_like_any_other():
    q = bbq(8, gamma_init="optimal")
    x = data().float()
    q(x)
    assert float(q.gamma.detach()) == pytest.approx(1.603 * float(x.square().mean().sqrt()), rel=1e-3)


def test_signs_are_the_same_for_all_tensors_of_a_width_and_cancel_in_the_product():
    weight, inputs = bbq(16, None, ROWS, signs=True), bbq(16, signs=True)
    assert torch.equal(weight.signs, inputs.signs)  # type: ignore[arg-type]
    assert set(inputs.signs.tolist()) == {-1, 1}  # type: ignore[union-attr]
    plain, x = bbq(16), data().float()
    inputs.initialize(x)
    plain.initialize(x)
    assert torch.equal(inputs(x), plain(x * inputs.signs))  # type: ignore[operator]
    assert not torch.equal(inputs(x), plain(x))
    w = data(1).float()
    turned = inputs.rotate(x) @ weight.rotate(w).T
    torch.testing.assert_close(turned, x @ w.T, rtol=1e-4, atol=1e-4)


def test_signs_spread_a_constant_row_over_the_codes():
    x = torch.ones(1, 128) + 0.01 * torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    used = [
        entropy_bits(
            code_counts(build_quantizer(QuantizerSpec(levels=16, options=o), 128, None, "").codes(x), 16)
        )
        for o in ({}, {"signs": True})
    ]
    assert used[0] < 1.5
    assert used[1] > used[0] + 1


@pytest.mark.parametrize("compiled", [True, False])
def test_packed_siblings_with_signs_are_the_trained_ones(compiled, monkeypatch, tmp_path):
    if compiled and not native.available():
        pytest.skip("the compiled kernels were not built")
    monkeypatch.setattr(native, "available", lambda: compiled)

    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(FEATURES, 7), nn.Linear(FEATURES, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) - self.k_proj(x)

    model = bb.prepare(Siblings(), Recipe.bbq(2, options={"signs": True}))
    x = data().float()
    model(x)
    packed = bb.convert(model.eval())
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    bb.save(packed, tmp_path / "m")
    assert torch.equal(bb.load(tmp_path / "m", into=Siblings())(x), packed(x))
