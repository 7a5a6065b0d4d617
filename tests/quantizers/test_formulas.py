"""Every method but BBQ against its definition, written out in float64 with explicit gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bellbox.quantizers import Quantizer, build_quantizer
from bellbox.quantizers.kmeans import KMeans
from bellbox.recipe import QuantizerSpec

ROWS, FEATURES, BLOCK = 6, 128, 32
BOUND = {torch.float64: 1e-6, torch.float32: 3e-5}  # thresholds and steps are fp32 numbers even in fp64


class Expected(NamedTuple):
    """Value, gradient to the input and to named parameters."""

    x_hat: Tensor
    g_x: Tensor
    parameters: dict[str, Tensor]


def data(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.3, 2, ROWS, dtype=torch.float64)[:, None]


def half_up(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


def hadamard(block: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix / math.sqrt(block)] * (FEATURES // block))


def quest(x: Tensor, g: Tensor, n: int, clip: float, rule: str) -> Expected:
    turned = x @ hadamard(BLOCK)
    s = turned.square().mean(-1, keepdim=True).sqrt()
    c = clip * s
    step = 2 * c / (n - 1)
    if n % 2:
        x_hat = step * half_up(turned.clamp(-c, c) / step)
    else:
        x_hat = step * half_up(turned.clamp(-c, c) / step + 0.5 - 1e-12) - step / 2
    passes = (x_hat - turned).abs() <= s * clip / (n - 1) if rule == "trust" else turned.abs() <= 1.3 * c
    return Expected(x_hat, (g * passes) @ hadamard(BLOCK).T, {})


def lsq(
    x: Tensor, g: Tensor, n: int, a: Tensor, low: float, high: float, shift: float, largest: float
) -> Expected:
    inside = (x / a - shift >= low) & (x / a - shift <= high)
    q = half_up((x / a - shift).clamp(low, high)) + shift
    g_a = (g * torch.where(inside, q - x / a, q)).sum() / math.sqrt(x.numel() * largest)
    return Expected(a * q, g * inside, {"a": g_a})


def pact_weight(x: Tensor, g: Tensor, n: int) -> Expected:
    c = CLIP[n] * x.square().mean(-1, keepdim=True).sqrt()
    q = half_up((x.clamp(-c, c) / c + 1) / 2 * (n - 1))
    return Expected(c * (2 * q / (n - 1) - 1), g, {})


def pact_input(x: Tensor, g: Tensor, n: int, alpha: Tensor, signed: bool) -> Expected:
    if signed:
        y = (x.clamp(-alpha, alpha) + alpha) / 2
        x_hat = 2 * half_up(y * (n - 1) / alpha) * alpha / (n - 1) - alpha
        inside, g_alpha = x.abs() <= alpha, g * x.sign() * (x.abs() > alpha)
    else:
        y = (x.abs() - (x - alpha).abs() + alpha) / 2
        x_hat = half_up(y * (n - 1) / alpha) * alpha / (n - 1)
        inside, g_alpha = (x > 0) & (x <= alpha), g * (x > alpha)
    return Expected(x_hat, g * inside, {"alpha": g_alpha.sum()})


def nearest(x: Tensor, g: Tensor, table: Tensor, scale: Tensor) -> Expected:
    distance = (x / scale)[..., None] - table
    return Expected(scale * table[distance.abs().argmin(-1)], g, {})


def absmax(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def seq(x: Tensor, g: Tensor, n: int, a: Tensor) -> Expected:
    def total(t: Tensor) -> Tensor:
        return (t.sum(-1, keepdim=True) if a.dim() else t.sum()) / math.sqrt(x.numel() * max(1, n / 2 - 1))

    if n == 2:
        sign = torch.where(x >= 0, 1.0, -1.0).double()
        return Expected(a * sign, g * ((x / a).abs() <= 1), {"a": total(g * sign)})
    m, d = n / 2, 0.5 * (n % 2 == 0)
    q = (half_up((x / a).clamp(-0.99, 0.99) * m - d) + d) / m
    inside = (x / a).abs() <= 0.99
    g_a = total(g * torch.where(inside, q - x / a, x.sign() * (m - d) / m))
    return Expected(a * q, g * inside, {"a": g_a})


def n2uq_weight(x: Tensor, g: Tensor, n: int, released: bool = True, masked: bool = False) -> Expected:
    """The released layer as its authors wrote it, under autograd: hard value, and w/s (or w) for the way back."""
    leaf = x.clone().requires_grad_()
    scale = ((n - 1) / (n / 2) * leaf.abs().mean(-1, keepdim=True)).detach()
    scaled, m = leaf / scale, (n - 1) / 2
    hard = scale * (half_up((scaled.clamp(-1, 1) + 1) * m) / m - 1)
    way_back = (scaled.clamp(-1, 1) if masked else scaled) * (1 if released else scale)
    x_hat = hard.detach() - way_back.detach() + way_back
    x_hat.backward(g)
    return Expected(x_hat.detach(), leaf.grad, {})  # type: ignore[arg-type]


def n2uq_input(x: Tensor, g: Tensor, n: int, q: Quantizer) -> Expected:
    leaves = {name: getattr(q, name).detach().double().requires_grad_() for name in ("beta", "a", "s1", "s2")}
    beta, a, s1, s2 = leaves.values()
    leaf = x.clone().requires_grad_()
    v, N = leaf * s1, n - 1
    soft, hard, begin = torch.zeros_like(v), torch.zeros_like(v), beta
    for i in range(N):
        ramp = 2 / N / a[i] * (v - begin)
        soft = torch.where((v > begin) & (v <= begin + a[i]), i * 2 / N + ramp, soft)
        hard = hard + (v.detach() >= begin + a[i] / 2) * (2 / N)
        begin = begin + a[i]
    soft = torch.where(v > begin, 2.0, soft)
    out = s2 * (soft + (hard - soft).detach() - 1)
    (out * g).sum().backward()
    assert leaf.grad is not None
    found = {name: value.grad for name, value in leaves.items() if value.grad is not None}
    assert len(found) == 4
    return Expected(out.detach(), leaf.grad, found)


CLIP = {2: 0.7978845587, 3: 1.2240089519, 4: 1.4935346200, 8: 2.0510683541, 16: 2.5139305786}
NF = {
    4: (-1, 0, 0.43582, 1),
    8: (-1, -0.53502, -0.24693, 0, 0.18334, 0.38199, 0.62299, 1),
}


def number(q: Quantizer, name: str) -> Tensor:
    value = getattr(q, name).detach().double()
    return value.reshape(()) if value.shape == (1,) else value


def case_quest(n: int, rule: str) -> Callable[[Quantizer, Tensor, Tensor], Expected]:
    return lambda q, x, g: quest(x, g, n, CLIP[n], rule)


def case_lsq(n: int, kind: str) -> Callable[[Quantizer, Tensor, Tensor], Expected]:
    half = n / 2
    low, high, shift, largest = {
        "mid-rise": (-half, half - 1, 0.5, max(1, half - 1)),
        "classic": (-half, half - 1, 0, max(1, half - 1)),
        "unsigned": (0, n - 1, 0, n - 1),
    }[kind]
    return lambda q, x, g: lsq(x, g, n, number(q, "a"), low, high, shift, largest)


def case_pact(n: int, signed: bool) -> Callable[[Quantizer, Tensor, Tensor], Expected]:
    return lambda q, x, g: pact_input(x, g, n, number(q, "alpha"), signed)


def case_nf(n: int) -> Callable[[Quantizer, Tensor, Tensor], Expected]:
    def expected(q: Quantizer, x: Tensor, g: Tensor) -> Expected:
        table = torch.tensor(q.table().tolist(), dtype=torch.float64)  # type: ignore[operator]
        if n in NF:
            torch.testing.assert_close(table, torch.tensor(NF[n], dtype=torch.float64), rtol=0, atol=6e-6)
        return nearest(x, g, table, absmax(x))

    return expected


def case_kmeans(n: int) -> Callable[[Quantizer, Tensor, Tensor], Expected]:
    def expected(q: Quantizer, x: Tensor, g: Tensor) -> Expected:
        groups, ones = x.reshape(-1, 64), g.reshape(-1, 64)
        scale = groups.abs().mean(-1, keepdim=True) if n <= 4 else absmax(groups)
        out = nearest(groups, ones, number(q, "centroids"), scale)
        return Expected(out.x_hat.reshape(x.shape), g, {})

    return expected


def case_rtn(n: int) -> Callable[[Quantizer, Tensor, Tensor], Expected]:
    return lambda q, x, g: nearest(x, g, torch.linspace(-1, 1, n, dtype=torch.float64), absmax(x))


def case_mass(q: Quantizer, x: Tensor, g: Tensor) -> Expected:
    s = x.square().mean(-1, keepdim=True).sqrt()
    return Expected(1.0908 * s * ((x >= 0.430727 * s).double() - (x < -0.430727 * s).double()), g, {})


CASES = [
    *(
        ("quest", n, role, {}, case_quest(n, "trust"))
        for n in (2, 3, 4, 8, 16)
        for role in ("weight", "input")
    ),
    *(("quest", n, "input", {"rule": "clip"}, case_quest(n, "clip")) for n in (2, 4)),
    *(("lsq", n, role, {}, case_lsq(n, "mid-rise")) for n in (2, 4, 8, 16) for role in ("weight", "input")),
    *(("lsq", n, "weight", {"classic": True}, case_lsq(n, "classic")) for n in (4, 16)),
    *(("lsq", n, "input", {"classic": True, "unsigned": True}, case_lsq(n, "unsigned")) for n in (4, 16)),
    *(("lsq", n, "input", {"unsigned": True}, case_lsq(n, "unsigned")) for n in (2, 3)),
    *(("lsq", n, "weight", {"unsigned": True}, case_lsq(n, "mid-rise")) for n in (2, 4)),
    *(("pact", n, "input", {}, case_pact(n, False)) for n in (2, 3, 4, 16)),
    *(("pact", n, "input", {"signed": True}, case_pact(n, True)) for n in (2, 3, 4, 16)),
    *(("pact", n, "weight", {}, lambda q, x, g: pact_weight(x, g, q.levels.n)) for n in (2, 3, 4, 8, 16)),
    *(("nf", n, role, {}, case_nf(n)) for n in (4, 8, 16) for role in ("weight", "input")),
    *(("n2uq", n, "weight", {}, lambda q, x, g: n2uq_weight(x, g, q.levels.n)) for n in (2, 4, 8, 16)),
    ("n2uq", 4, "weight", {"released_gradient": False}, lambda q, x, g: n2uq_weight(x, g, 4, False)),
    ("n2uq", 2, "weight", {"masked": True}, lambda q, x, g: n2uq_weight(x, g, 2, True, True)),
    (
        "n2uq",
        4,
        "weight",
        {"released_gradient": False, "masked": True},
        lambda q, x, g: n2uq_weight(x, g, 4, False, True),
    ),
    *(("n2uq", n, "input", {}, lambda q, x, g: n2uq_input(x, g, q.levels.n, q)) for n in (2, 3, 4, 16)),
    *(
        ("seq", n, role, {}, lambda q, x, g: seq(x, g, q.levels.n, number(q, "a")))
        for n in (2, 3, 4, 8, 16)
        for role in ("weight", "input")
    ),
    *(("kmeans", n, "weight", {}, case_kmeans(n)) for n in (2, 4, 8, 16)),
    ("ternary_support", 3, "weight", {}, lambda q, x, g: seq(x, g, 3, absmax(x))),
    ("ternary_support", 3, "input", {}, lambda q, x, g: seq(x, g, 3, absmax(x))),
    *(("ternary_mass", 3, role, {}, case_mass) for role in ("weight", "input")),
    *(("rtn", n, role, {}, case_rtn(n)) for n in (2, 4, 16, 255) for role in ("weight", "input")),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("method", "n", "role", "options", "formula"),
    CASES,
    ids=[f"{m}-{n}-{role}-{'-'.join(options)}" for m, n, role, options, _ in CASES],
)
def test_forward_and_gradients_are_those_of_the_definition(method, n, role, options, formula, dtype):
    block = BLOCK if method == "quest" else None
    spec = QuantizerSpec(method, n, block=block, options=options)
    q = build_quantizer(spec, FEATURES, ROWS if role == "weight" else None, "here").to(dtype)
    q.initialize(data(seed=1).to(dtype))
    with torch.no_grad():  # numbers as after some training
        for parameter in q.parameters():
            parameter.mul_(torch.linspace(0.5, 0.9, parameter.numel(), dtype=dtype).reshape(parameter.shape))
    x = data().to(dtype).requires_grad_()
    g = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        .to(dtype)
        .double()
    )
    out = q(x)
    (out.double() * g).sum().backward()
    expected = formula(q, x.detach().double(), g)
    if method.startswith(
        "ternary_support"
    ):  # the formula of SEQ, with a range that is not learned and nothing clipped
        expected = Expected(expected.x_hat, g, {})
    atol = {"ternary_mass": 1e-4}.get(method, BOUND[dtype])
    torch.testing.assert_close(out.detach().double(), expected.x_hat, rtol=0, atol=atol)
    bound = BOUND[dtype]
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), expected.g_x, rtol=bound, atol=bound)
    learned = {name: p for name, p in q.named_parameters() if p.requires_grad}
    assert set(learned) == set(expected.parameters)
    for name, parameter in learned.items():
        assert parameter.grad is not None
        theirs = expected.parameters[name].reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad.double(), theirs, rtol=10 * bound, atol=10 * bound)


def test_the_first_tensor_sets_the_scales_that_the_papers_start_from():
    x = data()
    rms, mean, largest = x.square().mean().sqrt(), x.abs().mean(), x.abs().max()
    for n, a in ((2, 2 * mean), (4, 2 * mean), (16, 2 * mean / math.sqrt(7))):
        q = build_quantizer(QuantizerSpec("lsq", n), FEATURES, None, "").double()
        q(x)
        torch.testing.assert_close(number(q, "a"), a)
    for n, a in ((2, x.abs().mean(-1, keepdim=True)), (4, absmax(x))):
        q = build_quantizer(QuantizerSpec("seq", n), FEATURES, ROWS, "").double()
        q.initialize(x)
        torch.testing.assert_close(number(q, "a"), a)
        q = build_quantizer(QuantizerSpec("seq", n), FEATURES, None, "").double()
        q(x)
        torch.testing.assert_close(number(q, "a"), mean if n == 2 else largest)
    for n, options, start in (
        (2, {"unsigned": True}, 2 * mean),
        (4, {"unsigned": True}, 2 * mean / math.sqrt(3)),
    ):
        q = build_quantizer(QuantizerSpec("lsq", n, options=options), FEATURES, None, "").double()
        q(x)
        torch.testing.assert_close(number(q, "a"), start)
    q = build_quantizer(QuantizerSpec("n2uq", 4), FEATURES, None, "").double()
    q(x)
    torch.testing.assert_close(number(q, "a"), (4 * rms / 3).expand(3))
    assert [p.item() for p in (q.beta, q.s1, q.s2)] == pytest.approx([-2 * rms.item(), 1, 2 * rms.item()])
    assert q.levels.thresholds == pytest.approx([float(t * rms) for t in (-4 / 3, 0, 4 / 3)], abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"classic": True}])
def test_a_step_of_lsq_that_training_took_below_zero_counts_by_its_magnitude(options):
    results = []
    for sign in (1.0, -1.0):
        q = build_quantizer(QuantizerSpec("lsq", 4, options=options), FEATURES, None, "").double()
        q.initialize(data(1))
        with torch.no_grad():
            q.a.mul_(sign)  # type: ignore[operator]
        x = data().requires_grad_()
        out = q(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad, sign * q.a.grad, q.codes(data()), q.scale()))  # type: ignore[operator]
    for positive, negative in zip(*results, strict=True):
        assert torch.equal(positive, negative)
    assert len(results[0][3].unique()) == 4


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_pact_starts_at_the_alpha_of_least_squared_error(n, signed):
    bell = torch.randn(1 << 16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = bell if signed else bell.relu()
    q = build_quantizer(QuantizerSpec("pact", n, options={"signed": signed}), 1, None, "").double()
    with torch.no_grad():
        q(x)
        start, errors = q.alpha.clone(), {}  # type: ignore[operator]
        for factor in (0.85, 0.95, 1.0, 1.05, 1.15):
            q.alpha.copy_(factor * start)  # type: ignore[operator]
            errors[factor] = float((q(x) - x).square().mean())
    assert min(errors, key=lambda factor: errors[factor]) in (0.95, 1.0, 1.05)
    assert errors[1.0] < 1.01 * min(errors.values())


def test_thresholds_of_n2uq_follow_a_change_that_no_version_counts():
    q = build_quantizer(QuantizerSpec("n2uq", 4), FEATURES, None, "").eval()
    before = q.codes(data().float())
    q.beta.data.add_(0.5)  # type: ignore[union-attr]
    assert not torch.equal(q.codes(data().float()), before)
    assert q.levels.thresholds == pytest.approx(q._thresholds().tolist())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("n", "centroids", "error"),
    [(2, (1.0,), 0.358), (4, (0.57, 1.88), 0.116), (8, (), 0.0316), (16, (), 0.0076)],
)
def test_kmeans_finds_the_expected_centroids_of_gaussian_weights(n, centroids, error):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    q = build_quantizer(QuantizerSpec("kmeans", n), 1024, 512, "")
    assert isinstance(q, KMeans)
    q.initialize(weight)
    if centroids:
        assert q.centroids[n // 2 :].tolist() == pytest.approx(centroids, abs=0.01)
    assert float((q(weight) - weight).square().mean()) == pytest.approx(error, rel=0.01)
    again = build_quantizer(QuantizerSpec("kmeans", n), 1024, 512, "")
    again.initialize(weight)
    assert torch.equal(again.centroids, q.centroids)  # type: ignore[arg-type]


def test_kmeans_takes_weights_with_fewer_different_values_than_levels():
    for weight in (torch.zeros(4, 64), torch.ones(4, 64), torch.tensor([1.0, -1.0]).repeat(4, 32)):
        q = build_quantizer(QuantizerSpec("kmeans", 8), 64, 4, "")
        q.initialize(weight)
        torch.testing.assert_close(q(weight), weight)


@pytest.mark.filterwarnings("ignore:.*nothing to rotate")
def test_a_scale_of_one_number_gets_the_gradient_of_one_number():
    """The smallest tensor: the gain is 1 / sqrt(1 Qp), and BBQ's 1."""
    x = torch.tensor([[0.3]])
    found = {}
    for method, name in (("lsq", "a"), ("seq", "a"), ("bbq", "gamma")):
        quantizer = build_quantizer(QuantizerSpec(method, 16, block=1), 1, None, "").train()
        with torch.no_grad():
            quantizer.get_parameter(name).fill_(0.5)
        quantizer(x).backward(torch.tensor([[2.0]]))
        gradient = quantizer.get_parameter(name).grad
        assert gradient is not None
        found[method] = float(gradient)
    v = 0.3 / 0.5
    nearest = math.floor(v) + 0.5  # of the levels +-1/2, +-3/2, ...
    assert found["lsq"] == pytest.approx(2 * (nearest - v) / math.sqrt(7), rel=1e-5)
    nearest = (math.floor(v * 8) + 0.5) / 8  # of +-1/16, +-3/16, ...
    assert found["seq"] == pytest.approx(2 * (nearest - v) / math.sqrt(7), rel=1e-5)
    # Over its own RMS it is 1: code floor(16 Phi(1)) = 13, level 13 - 8, which stands for (5 - z) / 8 of gamma.
    level = 13 - build_quantizer(QuantizerSpec("bbq", 16, block=1), 1, None, "").levels.offset
    assert found["bbq"] == pytest.approx(2 * level / 8, rel=1e-5)
