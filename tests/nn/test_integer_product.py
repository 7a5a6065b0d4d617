"""Training whose forward multiplies integers: the deployed function, with gradients of the float forward."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers, weights_quantized_once
from bellbox.ops import native
from bellbox.utils.memory import Saved

X = torch.randn(6, 40, 128, generator=torch.Generator().manual_seed(0))
GENERIC = {
    "quest": bb.Recipe.of("quest", 2, keep_ends=False, integer_forward=True),
    "lsq": bb.Recipe.of("lsq", 3, keep_ends=False, integer_forward=True),
    "zeta": bb.Recipe.bbq_vision(2, keep_ends=False, integer_forward=True),
    "8 bits": bb.Recipe.of("rtn", levels=127, keep_ends=False, integer_forward=True),
}
KEPT = {
    **{f"{bits} bits": bb.Recipe.bbq(bits, keep_ends=False, integer_forward=True) for bits in (1, 2, 3, 4)},
    "paper": bb.Recipe.bbq_paper(2, keep_ends=False, integer_forward=True),
    "ema": bb.Recipe.bbq(2, granularity="ema", keep_ends=False, integer_forward=True),
    "W2A4": bb.Recipe.bbq(2, activation_levels=16, keep_ends=False, integer_forward=True),
    "ternary": bb.Recipe.bbq(levels=3, keep_ends=False, integer_forward=True),
    "signs": bb.Recipe.bbq_paper(2, options={"signs": True}, keep_ends=False, integer_forward=True),
}


class Net(nn.Module):
    """Siblings that share their input, and biases: without, sums of exactly zero lie on thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(128, 96), nn.Linear(128, 96)
        self.o = nn.Linear(96, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


def network(recipe: bb.Recipe) -> nn.Module:
    torch.manual_seed(0)
    return bb.prepare(Net(), recipe, example=X)


def choose(model: nn.Module, integers: bool | None) -> nn.Module:
    for _, layer in quantized_layers(model):
        layer.integer_forward = integers
    return model


def step(model: nn.Module, bf16: bool = False, x: Tensor = X) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), x.grad, *gradients]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", [*KEPT, *GENERIC])
def test_the_training_forward_is_that_of_evaluation(name: str, bf16: bool) -> None:
    model = network({**KEPT, **GENERIC}[name])
    step(model)  # sets scales
    if name in ("paper", "ema", "signs"):  # whose statistic in evaluation is another
        pytest.skip("training looks at the whole batch")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        trained = model(X)
        with torch.no_grad():
            model.eval()
            assert torch.equal(trained, model(X))
            packed = bb.convert(model)
            assert torch.equal(trained, packed(X))


@pytest.mark.parametrize("name", KEPT)
def test_gradients_differ_from_the_float_forward_by_what_a_byte_leaves_out(name: str) -> None:
    model = network(KEPT[name])
    step(model)
    found = step(model)
    wanted = step(choose(model, False))
    assert len(found) == len(wanted) >= 9
    assert apart(found[0], wanted[0]) < 1e-5
    for a, b in zip(found[1:], wanted[1:], strict=True):
        # The gradient of an input's gamma is a sum in which much cancels.
        assert apart(a, b) < 0.012 if b.numel() > 1 else float((a - b).abs()) < 0.02 * float(b.abs() + 1)


@pytest.mark.parametrize("name", GENERIC)
def test_gradients_of_other_methods_are_those_of_the_float_forward(name: str) -> None:
    model = network(GENERIC[name])
    step(model)
    found = step(model)
    wanted = step(choose(model, False))
    assert all(apart(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_under_autocast_gradients_are_as_near_as_bf16() -> None:
    model = network(KEPT["2 bits"])
    step(model)
    wanted = step(choose(model, False))
    by_floats, by_integers = step(choose(model, False), bf16=True), step(choose(model, True), bf16=True)
    for a, b, exact in zip(by_integers[1:], by_floats[1:], wanted[1:], strict=True):
        assert exact.numel() == 1 or apart(a, exact) < apart(b, exact) + 0.01


def test_where_nothing_is_said_it_is_taken_in_bf16_on_compiled_kernels() -> None:
    model = network(bb.Recipe.bbq(2, keep_ends=False))
    layer = model.q  # type: ignore[union-attr]
    assert layer.trains_on_integers("cpu", torch.bfloat16) == native.available()
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.float16), ("cuda", torch.bfloat16)):
        assert not layer.trains_on_integers(device, dtype)
    assert not network(bb.Recipe.of("lsq", 2, keep_ends=False)).q.trains_on_integers("cpu", torch.bfloat16)  # type: ignore[union-attr]
    off = network(bb.Recipe.bbq(2, keep_ends=False, integer_forward=False))
    assert not off.q.trains_on_integers("cpu", torch.bfloat16)  # type: ignore[union-attr]
    for method in ("cewt", "nf"):  # which keep each row's norm, or whose levels are no grid
        model = network(bb.Recipe.of(method, 2, keep_ends=False, integer_forward=True))
        assert not model.q.trains_on_integers("cpu", torch.float32)  # type: ignore[union-attr]


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of tensors that a forward keeps for its backward, parameters and the input aside."""
    with Saved((*model.parameters(), *model.buffers(), x)) as saved:
        model(x)
    return saved.nbytes


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_byte_a_number_is_all_that_is_kept(compiled: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256, bias=False) for _ in range(12)]
    recipe = bb.Recipe.bbq(2, keep_ends=False, integer_forward=True)
    model, x = bb.prepare(nn.Sequential(*layers), recipe), torch.randn(512, 256, requires_grad=True)
    model(x)
    forward = torch.compile(model) if compiled else model
    if compiled:
        forward(x)
    numbers = 12 * (512 * 256 + 256 * 256)
    assert saved_bytes(forward, x) < 1.1 * numbers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("once", [False, True])
def test_checkpointed_it_has_the_same_gradients(reentrant: bool, once: bool) -> None:
    model = network(KEPT["2 bits"])
    step(model)
    wanted = step(model)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inside, x, use_reentrant=reentrant)

    with weights_quantized_once(model) if once else nullcontext():
        x = X.clone().requires_grad_()
        y = Checkpointed()(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = [y.detach(), x.grad, *[p.grad for p in model.parameters() if p.grad is not None]]
    assert len(found) == len(wanted)
    assert all(apart(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_it_is_the_eager_function(bf16: bool) -> None:
    model = network(KEPT["2 bits"])
    step(model)
    wanted = step(model, bf16)
    found = step(torch.compile(copy.deepcopy(model), fullgraph=True), bf16)  # type: ignore[arg-type]
    if bf16:  # the compiler rounds less between tanh and product, so that some codes are others
        assert apart(found[0], wanted[0]) < 0.05
        return
    assert torch.equal(found[0], wanted[0])
    assert all(apart(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_micro_batches_share_the_coded_weight() -> None:
    model = network(KEPT["2 bits"])
    step(model)
    whole = step(model)
    with weights_quantized_once(model):
        for part, weights in zip(
            X.split(2), torch.linspace(-1, 1, X.numel()).view_as(X).split(2), strict=True
        ):
            (model(part) * weights).sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    # gamma's gradient of an input is divided by the root of what a batch holds
    named = [n for n, p in model.named_parameters() if p.grad is not None]
    for name, a, b in zip(named, found, whole[2:], strict=True):
        assert a is not None
        assert apart(a, b * 3**0.5 if "activation_quantizer" in name else b) < 1e-5, name


def test_siblings_train_in_one_form() -> None:
    class Siblings(nn.Module):
        input_groups = (("q", "k"),)

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    inputs = bb.QuantizerSpec("bbq", 4, granularity="ema", block=1)
    rules = tuple(
        bb.Rule(name, bb.QuantizerSpec(method, 4, block=1), inputs)
        for name, method in (("q", "bbq"), ("k", "nf"))
    )
    model = bb.prepare(Siblings(), bb.Recipe(rules=rules, integer_forward=True))
    seen: list[Tensor] = []
    q: Any = model.q
    assert q.activation_quantizer is model.k.activation_quantizer  # type: ignore[union-attr]
    q.activation_quantizer.observers.append(seen.append)
    model(X[0, :, :64])
    assert len(seen) == 1
    assert not q.trains_on_integers("cpu", torch.float32)
    alike = tuple(bb.Rule(rule.pattern, bb.QuantizerSpec("bbq", 4, block=1), inputs) for rule in rules)
    assert bb.prepare(Siblings(), bb.Recipe(rules=alike, integer_forward=True)).q.trains_on_integers(
        "cpu", torch.float32
    )  # type: ignore[union-attr]


def test_a_second_derivative_is_refused_in_one_line() -> None:
    model = network(KEPT["2 bits"])
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, retain_graph=True)
    with pytest.raises(BellboxError, match="integer_forward=False"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert g.isfinite().all()


def test_functional_transforms_take_the_float_forward() -> None:
    model = network(KEPT["2 bits"])
    step(model)
    state = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, X)
    assert all(g.isfinite().all() for g in each.values())


def test_a_row_that_is_not_finite_is_nan_and_no_other() -> None:
    model = network(KEPT["2 bits"])
    step(model)
    broken = X.clone()
    broken[2, 3, 5] = torch.nan
    y = model(broken)
    assert bool(y[2, 3].isnan().all())
    assert int(y.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("side", ["input", "weight"])
def test_gradients_are_nan_where_those_of_the_float_forward_are(side: str) -> None:
    """Bytes hold no NaN, so nothing but the row's scale tells the gradient of gamma that its row is not finite."""
    model = network(KEPT["2 bits"])
    step(model)
    x = X.clone()
    with torch.no_grad():
        (x[2, 3] if side == "input" else model.o.weight[4])[5] = torch.nan
    found, wanted = step(choose(model, True), x=x), step(choose(model, False), x=x)
    assert [g.isnan().tolist() for g in found] == [g.isnan().tolist() for g in wanted]
    assert any(g.isnan().any() for g in wanted)
    # The gradient that comes in is finite here: only gamma's own rows are NaN.
    layer: Any = dict(quantized_layers(model))["o"]
    for integers in (True, False):
        model.zero_grad()
        choose(model, integers)
        layer(x.new_ones(3, 96)).sum().backward()
        marks = layer.weight_quantizer.gamma.grad.isnan().flatten()
        assert marks.nonzero().flatten().tolist() == ([4] if side == "weight" else [])
