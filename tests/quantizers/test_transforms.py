"""Per-sample gradients, second derivatives and the other transforms of `torch.func`, for every method."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import bellbox as bb
from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError
from bellbox.nn import InputCache
from bellbox.quantizers import METHODS, QuantizerSpec, build_quantizer

RECIPES = {
    **{name: bb.Recipe.of(name, bits=2) for name in METHODS if not name.startswith(("kmeans", "ternary"))},
    "kmeans": bb.Recipe.of("kmeans", bits=2, weight_only="float"),
    "ternary_mass": bb.Recipe.of("ternary_mass", levels=3),
    "bbq": bb.Recipe.bbq(bits=2),
    "bbq-tensor": bb.Recipe.bbq_paper(2),
    "bbq-zeta": bb.Recipe.bbq(2, weights_rotated=False, options={"zeta": 1.694}),
    "bbq-signs": bb.Recipe.bbq(2, weights_rotated=False, options={"signs": True}),
}
every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def network(name: str, seen: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1)), RECIPES[name])
    if seen:
        model(X)
    return model


def images(seen: bool = True) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Tanh(), nn.Conv2d(16, 4, 3, padding=1), nn.Flatten())
    model = bb.prepare(nn.Sequential(nn.Unflatten(1, (1, 8, 8)), conv), bb.Recipe.bbq_vision(2))
    if seen:
        model(X)
    return model


def assert_per_sample(model: nn.Module) -> None:
    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), X)
    for i, one in enumerate(X):
        model.zero_grad()
        model(one[None]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                bound = 1e-4 * float(p.grad.abs().max()) + 1e-7
                torch.testing.assert_close(found[name][i], p.grad, rtol=0, atol=bound)


@every_recipe
def test_per_sample_gradients_equal_a_loop(name):
    assert_per_sample(network(name))


def test_per_sample_gradients_of_convolutions():
    assert_per_sample(images())


@every_recipe
def test_a_batched_forward_equals_a_loop(name):
    model = network(name)
    loop = torch.stack([model(one[None])[0] for one in X])
    torch.testing.assert_close(vmap(lambda one: model(one[None])[0])(X), loop, rtol=1e-6, atol=1e-6)


@every_recipe
def test_a_gradient_penalty_and_the_gradient_that_it_differentiates(name):
    model = network(name)
    z = X.clone().requires_grad_()
    (plain,) = torch.autograd.grad(model(z).sum(), z)
    (recorded,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
    assert torch.equal(plain, recorded)  # recording it changes no bit
    recorded.square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    direction = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    pull = vjp(grad(lambda x: model(x).sum()), X)[1]
    z = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first, z, direction)
    torch.testing.assert_close(pull(direction)[0], second, rtol=1e-5, atol=1e-6)
    assert jacrev(model)(X).shape == (4, 1, 4, 64)


def second(
    first: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], weights: list[Tensor]
) -> list[Tensor]:
    """Gradients of a weighted sum of first derivatives."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    total = sum(((w * g).sum() for w, g in zip(weights, first(*leaves), strict=True)), torch.zeros(()))
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def draws(*like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in like]


@pytest.mark.parametrize("granularity", ["row", "token", "tensor"])
@pytest.mark.parametrize("options", [{}, {"zeta": 1.3}])
def test_second_derivatives_of_bbq_are_those_of_the_soft_function(granularity, options):
    rows = 4 if granularity == "row" else None
    q = build_quantizer(
        QuantizerSpec("bbq", 4, granularity=granularity, block=16, options=options), 64, rows, ""
    )
    q.double().initialize(X.double())
    x = X.double()
    g, c = draws(x, x)
    whole = granularity == "tensor"

    def soft(x: Tensor, gamma: Tensor) -> Tensor:
        sigma = x.square().mean().sqrt() if whole else x.square().mean(-1, keepdim=True).sqrt()
        v = hadamard(x, 16) / sigma
        return gamma * torch.erf(v / math.sqrt(2)), sigma  # type: ignore[return-value]

    def ours(x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        parameters = {} if options else {"gamma": gamma}
        out = functional_call(q, parameters, (x,))
        return torch.autograd.grad((out * g).sum(), x, create_graph=True)

    def theirs(x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        out, sigma = soft(x, gamma)
        value = out
        if options:  # zeta sigma stands in for gamma, and the code, a constant, is multiplied with it
            codes = (q(x.detach()) / (1.3 * sigma)).detach()
            value = (
                1.3 * sigma.detach() * torch.erf(hadamard(x, 16) / sigma / math.sqrt(2)) + 1.3 * sigma * codes
            )
            held = 1.3 * sigma
            (a,) = torch.autograd.grad((held * codes * g).sum(), x, create_graph=True)
            v = hadamard(x, 16) / sigma
            slope = g * held * 2 * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
            (b,) = torch.autograd.grad(v, x, slope, create_graph=True)
            return (a + b,)
        return torch.autograd.grad((value * g).sum(), x, create_graph=True)

    gamma = torch.full((4, 1) if rows else (1,), 0.7, dtype=torch.float64)
    for mine, expected in zip(second(ours, [x, gamma], [c]), second(theirs, [x, gamma], [c]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def test_second_derivatives_of_lsq():
    q = build_quantizer(QuantizerSpec("lsq", 4, block=1), 64, None, "").double()
    q.initialize(X.double())
    x, a = X.double(), q.get_parameter("a").detach().clone()
    g, c_x, c_a = draws(x, x, a)

    def ours(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        out = functional_call(q, {"a": a}, (x,))
        return torch.autograd.grad((out * g).sum(), (x, a), create_graph=True)

    def theirs(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        v = x / a
        inside = v.detach().abs() <= 1.5  # the outer levels
        levels = (q(x.detach()) / a).detach()  # constants
        share = torch.where(inside, levels - v, levels)
        return g * inside, (g * share).sum().reshape(1) / math.sqrt(x.numel())

    for one, other in zip(ours(*(t.clone().requires_grad_() for t in (x, a))), theirs(x, a), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    for mine, expected in zip(
        second(ours, [x, a], [c_x, c_a]), second(theirs, [x, a], [c_x, c_a]), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_second_derivatives_of_learned_thresholds():
    q = build_quantizer(QuantizerSpec("n2uq", 4), 64, None, "").double()
    q.initialize(X.double())
    names = ["beta", "a", "s1", "s2"]
    inputs = [X.double(), *(q.get_parameter(name).detach().clone() for name in names)]
    g, *weights = draws(inputs[0], *inputs[:4])

    def ours(x: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        out = functional_call(q, dict(zip(names, numbers, strict=True)), (x,))
        return torch.autograd.grad((out * g).sum(), (x, *numbers[:3]), create_graph=True)

    def theirs(x: Tensor, beta: Tensor, a: Tensor, s1: Tensor, s2: Tensor) -> tuple[Tensor, ...]:
        begin, v = beta + a.cumsum(0) - a, x * s1
        parts = [((v - b) / w).clamp(0, 1) for b, w in zip(begin, a, strict=True)]
        line = s2 * (2 / 3) * (sum(parts, torch.zeros(())) - 1.5)
        return torch.autograd.grad((line * g).sum(), (x, beta, a, s1), create_graph=True)

    for mine, expected in zip(second(ours, inputs, weights), second(theirs, inputs, weights), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-8)


def test_learned_thresholds_add_a_second_derivative_to_a_first():
    q = build_quantizer(QuantizerSpec("n2uq", 4), 64, None, "").double()
    q.initialize(X.double())
    names = ["beta", "a", "s1", "s2"]
    numbers = [q.get_parameter(name).detach().clone() for name in names]
    numbers[3].fill_(3.0)
    x, g, c, d = X.double(), *draws(*[X.double()] * 3)

    def gradients(second: bool, first: bool) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, *numbers)]
        out = functional_call(q, dict(zip(names, inputs[1:], strict=True)), (inputs[0],))
        g_x, g_a = torch.autograd.grad((out * g).sum(), (inputs[0], inputs[2]), create_graph=True)
        # What is left out must not be there at all: times zero it would still be a gradient, and added.
        total = sum(
            ([(g_x * c).sum() + g_a.square().sum()] if second else []) + ([(out * d).sum()] if first else [])
        )
        assert isinstance(total, Tensor)
        return [t for t in torch.autograd.grad(total, inputs, allow_unused=True) if t is not None]

    both, alone = gradients(True, True), (gradients(True, False), gradients(False, True))
    assert len(both) == len(alone[0]) == len(alone[1]) == 5
    for whole, one, other in zip(both, *alone, strict=True):
        torch.testing.assert_close(whole, one + other, rtol=1e-10, atol=1e-12)
        assert float(one.abs().max()) > 1e-9 or float(other.abs().max()) > 1e-9


@pytest.mark.parametrize("s2", [1.0, 3.0, -1.0])
def test_the_gradient_of_an_output_factor_follows_the_codes(s2: float):
    q = build_quantizer(QuantizerSpec("n2uq", 4), 64, None, "").double()
    q.initialize(X.double())
    (g,) = draws(X.double())
    g.requires_grad_()
    factor = torch.full_like(q.get_parameter("s2"), s2).requires_grad_()
    out = functional_call(q, {"s2": factor}, (X.double(),))
    (found,) = torch.autograd.grad((out * g).sum(), factor, create_graph=True)
    torch.testing.assert_close(found.sum(), (out * g).sum() / s2)
    (codes,) = torch.autograd.grad(found.sum(), g)
    torch.testing.assert_close(codes, out.detach() / s2)


def test_what_a_transform_cannot_do_is_said():
    with pytest.raises(BellboxError, match="no forward-mode derivative"):
        jvp(network("lsq"), (X,), (X,))
    for model in (nn.Linear(64, 8), nn.Sequential(nn.Unflatten(-1, (16, 2, 2)), nn.Conv2d(16, 4, 1))):
        bb.prepare(model := nn.Sequential(model), bb.Recipe.bbq(2, keep_ends=False))(X)
        packed = bb.convert(model.eval())
        with pytest.raises(BellboxError, match="no forward-mode derivative"):
            jvp(packed, (X,), (X,))
    with pytest.raises(BellboxError, match=r"0\.input: its scale is not set, and within torch\.func"):
        vmap(network("bbq", seen=False))(X[:, None])
    running = bb.prepare(
        nn.Sequential(nn.Linear(64, 8)), bb.Recipe.bbq(2, granularity="ema", weights_rotated=False)
    )
    running(X)
    with pytest.raises(BellboxError, match="running scale"):
        vmap(running)(X[:, None])
    loop = torch.stack([running.eval()(one[None]) for one in X])
    torch.testing.assert_close(vmap(running)(X[:, None]), loop)


def test_a_shared_input_is_coded_anew_with_numbers_that_functional_call_puts_in_place():
    cache, one, two = InputCache(2), torch.ones(1), torch.full((1,), 2.0)
    assert one._version == two._version
    results = [
        cache.get_or_compute(name, X, (), [t], lambda x, t=t: x * t) for name, t in (("q", one), ("k", two))
    ]
    assert torch.equal(results[1], 2 * X)
    shared = [cache.get_or_compute(name, X, (), [one], lambda x: x * one) for name in ("q", "k")]
    assert shared[0] is shared[1]


def test_second_derivatives_reach_the_gradient_that_came_in():
    """The first derivative is linear in G; the layers behind this one are differentiated through it."""
    q = build_quantizer(QuantizerSpec("lsq", 4, block=1), 64, None, "").double()
    q.initialize(X.double())
    x, a = X.double(), q.get_parameter("a").detach().clone()
    g, c_x, c_a = draws(x, x, a)
    inside = (x / a).abs() <= 1.5
    levels = (q(x) / a).detach()
    share = torch.where(inside, levels - x / a, levels) / math.sqrt(x.numel())
    for weights, expected in (
        ((c_x, None), c_x * inside),
        ((None, c_a), c_a * share),
        ((c_x, c_a), c_x * inside + c_a * share),
    ):
        x_in, a_in, g_in = (t.clone().requires_grad_() for t in (x, a, g))
        out = functional_call(q, {"a": a_in}, (x_in,))
        first = torch.autograd.grad(out, (x_in, a_in), g_in, create_graph=True)
        parts = [(w * f).sum() for w, f in zip(weights, first, strict=True) if w is not None]
        (found,) = torch.autograd.grad(sum(parts, torch.zeros(())), g_in)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("start", [0.7, 0.0])
def test_second_derivatives_of_bbq_reach_the_gradient_that_came_in(start):
    q = build_quantizer(QuantizerSpec("bbq", 4, granularity="token", block=16), 64, None, "").double()
    x, gamma = X.double(), torch.full((1,), start, dtype=torch.float64)
    g, c = draws(x, x)
    found, expected = [], []
    for results, ours in ((found, True), (expected, False)):
        x_in, g_in = x.clone().requires_grad_(), g.clone().requires_grad_()
        if ours:
            out = functional_call(q, {"gamma": gamma}, (x_in,))
        else:
            v = hadamard(x_in, 16) / x_in.square().mean(-1, keepdim=True).sqrt()
            out = gamma * torch.erf(v / math.sqrt(2))
        (first,) = torch.autograd.grad(out, x_in, g_in, create_graph=True)
        results.extend(torch.autograd.grad((c * first).sum(), (x_in, g_in)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
