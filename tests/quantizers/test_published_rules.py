"""Options that are an author's own rule, against a formula in float64 under autograd: random shapes, 1 to 4 bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError
from bellbox.nn.record import Side
from bellbox.quantizers import Quantizer, build_quantizer
from bellbox.recipe import QuantizerSpec, Recipe

BITS = [1, 2, 3, 4]
shapes = {"rows": st.integers(1, 9), "features": st.integers(2, 70), "seed": st.integers(0, 10**6)}


def numbers(rows: int, features: int, seed: int) -> Tensor:
    """fp64 `[rows, features]`, rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) * torch.linspace(
        0.4, 3, rows, dtype=torch.float64
    ).reshape(-1, 1)


def scaled_gradient(a: Tensor, gain: float) -> Tensor:
    """The value of a, `gain` times its gradient."""
    return gain * a + ((1 - gain) * a).detach()


def straight(hard: Tensor, soft: Tensor) -> Tensor:
    return soft + (hard - soft).detach()


def paretoq(x: Tensor, a: Tensor, bits: int) -> Tensor:
    """`x_hat` as ParetoQ's code has it: sign, stretched levels, or LSQ."""
    largest = max(1, 2 ** (bits - 1) - 1)
    a = scaled_gradient(a, 1 / math.sqrt(x.numel() * largest))
    if bits == 1:
        passing = a.detach() * (x / a.detach()).clamp(-1, 1)
        return a * x.sign() + passing - passing.detach()
    return stretched(x, a, bits) if bits == 2 else lsq(x, a, bits)


def stretched(x: Tensor, a: Tensor, bits: int) -> Tensor:
    m, v = 2 ** (bits - 1), (x / a).clamp(-0.99, 0.99)
    return a * straight((torch.round(v * m - 0.5) + 0.5) / m, v)


def lsq(x: Tensor, a: Tensor, bits: int) -> Tensor:
    v = (x / a).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return a * straight(torch.round(v), v)


def compared(q: Quantizer, name: str, x: Tensor, expected) -> None:
    """Output and gradients of a quantizer whose number is called `name`, to the bar of 1e-5."""
    own = getattr(q, name)
    leaves = [x.to(own.dtype).requires_grad_(), own]
    g = numbers(*x.shape, seed=99)
    out = q(leaves[0])
    ours = torch.autograd.grad(out, leaves, g.to(out.dtype))
    wide = [x.clone().requires_grad_(), own.detach().double().requires_grad_()]
    wanted = expected(wide[0], wide[1])
    theirs = torch.autograd.grad(wanted, wide, g)
    for mine, other in ((out, wanted), *zip(ours, theirs, strict=True)):
        torch.testing.assert_close(mine.double(), other.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("role", ["weight", "input"])
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=8, deadline=None)
@given(**shapes)
def test_seq_with_the_rule_of_paretoq_is_paretoqs(bits, role, rows, features, seed):
    x = numbers(rows, features, seed)
    spec = QuantizerSpec("seq", 2**bits, options={"rule": "paretoq"})
    q = build_quantizer(spec, features, rows if role == "weight" else None, "").double()
    q.initialize(x)
    size = x.abs() if role == "weight" else x.abs().reshape(1, -1)
    start = size.mean(-1) if bits == 1 else size.amax(-1) / (2 ** (bits - 1) - 1 if bits > 2 else 1)
    torch.testing.assert_close(q.a.detach().reshape(-1), start, rtol=1e-5, atol=0)  # type: ignore[operator]
    with torch.no_grad():
        q.a.mul_(0.45)  # type: ignore[operator]
    compared(q, "a", x, lambda leaf, a: paretoq(leaf, a, bits))


@pytest.mark.parametrize("bits", BITS)
def test_the_rules_of_seq_are_two_functions_above_2_bits_and_one_below(bits):
    x, sides, outputs = numbers(5, 64, 0).float(), [], []
    for options in ({}, {"rule": "stretched"}, {"rule": "paretoq"}):
        q = build_quantizer(QuantizerSpec("seq", 2**bits, options=options), 64, 5, "")
        q.initialize(x)
        outputs.append(q(x))
        sides.append(Side.of(q))
    assert torch.equal(outputs[0], outputs[1])
    assert sides[0] == sides[1]
    assert torch.equal(outputs[0], outputs[2]) == (bits <= 2)
    assert (sides[0] == sides[2]) == (bits <= 2)


def test_whole_levels_of_seq_go_to_8_bits_and_are_even_in_number():
    q = build_quantizer(QuantizerSpec("seq", 256, options={"rule": "paretoq"}), 64, 5, "")
    assert (q.levels.integers[0], q.levels.integers[-1]) == (-128, 127)
    assert q.why_not_packed() is None
    for n, zero_point in ((5, None), (255, None), (8, -0.5), (16, 1.0)):
        with pytest.raises(BellboxError, match="2, 3, 4 or an even number of levels"):
            build_quantizer(QuantizerSpec("seq", n, zero_point, options={"rule": "paretoq"}), 64, 5, "")
    ternary = build_quantizer(QuantizerSpec("seq", 3, options={"rule": "paretoq"}), 64, 5, "")
    assert ternary.levels.integers == (-1, 0, 1)


@pytest.mark.parametrize("granularity", ["token", "tensor", "ema"])
@pytest.mark.parametrize("role", ["weight", "input"])
@pytest.mark.parametrize("bits", BITS)
def test_gamma_may_start_at_one_whatever_the_data(bits, role, granularity):
    rows, features, zero_point = 6, 48, 0.0 if bits > 2 else -0.5
    spec = QuantizerSpec(
        "bbq",
        2**bits,
        None,
        granularity if role == "input" else None,
        16,
        {"gamma_init": "one"},
    )
    q, x = build_quantizer(spec, features, rows if role == "weight" else None, ""), numbers(rows, features, 1)
    q.initialize(37 * x.float())
    assert torch.equal(q.gamma, torch.ones_like(q.gamma))  # type: ignore[arg-type]
    own = q.double()

    def expected(leaf: Tensor, gamma: Tensor) -> Tensor:
        each = role == "weight" or granularity == "token"
        square = leaf.square().mean(-1, keepdim=True) if each else leaf.square().mean()
        box = 2**bits * 0.5 * torch.erfc(-hadamard(leaf, 16) / square.sqrt() / math.sqrt(2))
        level = straight(box.detach().floor().clamp(0, 2**bits - 1), box) - 2**bits / 2 - zero_point
        return scaled_gradient(gamma, x.numel() ** -0.5) / (2**bits / 2) * level

    compared(own, "gamma", x, expected)


def test_the_recipe_of_bbq_takes_gammas_start_by_name():
    for start in ("one", "optimal", 1.5):
        rule = Recipe.bbq(2, gamma_init=start).rules[-1]  # type: ignore[arg-type]
        assert rule.weights is not None
        assert rule.weights.options["gamma_init"] == start
    with pytest.raises(BellboxError, match=r"option 'gamma_init.*' of bbq"):
        Recipe.of("bbq", 2, options={"gamma_init": "two"})


@pytest.mark.parametrize(
    ("n", "zero_point"), [(129, None), (129, -0.5), (256, None), (4, 0.0), (4, -1.0), (128, 0.0)]
)
def test_seq_refuses_more_levels_than_its_clip_leaves_and_any_other_zero_point(n, zero_point):
    with pytest.raises(BellboxError, match="seq has 2 to 128 levels, symmetric about zero"):
        build_quantizer(QuantizerSpec("seq", n, zero_point), 8, None, "")
    assert build_quantizer(QuantizerSpec("seq", 128, -0.5), 8, None, "").levels.n == 128


@pytest.mark.parametrize(
    ("method", "levels", "zero_point"),
    [
        ("nf", 4, 0.5),
        ("nf", 6, None),
        ("nf", 6, 0.5),
        ("ternary_support", 3, 0.5),
        ("ternary_support", 4, None),
    ],
)
def test_grids_that_a_method_does_not_have_are_refused(
    method: str, levels: int, zero_point: float | None
) -> None:
    with pytest.raises(BellboxError):
        build_quantizer(QuantizerSpec(method, levels, zero_point), 64, 8, "")


def test_ternary_takes_its_own_zero_point() -> None:
    assert build_quantizer(QuantizerSpec("ternary_support", 3, -0.5), 64, 8, "").levels.n == 3
