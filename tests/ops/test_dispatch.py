"""The registry of backends: who is asked first, who runs, and what says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.ops import dispatch, native, packed_linear


class Toy(dispatch.Backend):
    """Runs the reference, and counts."""

    name = "toy"
    priority = 99

    def __init__(self) -> None:
        self.calls = 0

    def why_not(self, operation: str, arguments: Mapping[str, Any]) -> str | None:
        if operation != "packed_linear":
            return "knows one operation"
        return None if arguments["x"].dtype == torch.float32 else f"the input is {arguments['x'].dtype}"

    def has(self, operation: str) -> bool:
        return operation == "packed_linear"

    def implementation(self, operation: str) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            self.calls += 1
            return dispatch.OPERATIONS[operation].reference(*arguments)

        return run


@pytest.fixture
def toy() -> Iterator[Toy]:
    made = Toy()
    dispatch.register(made)
    yield made
    dispatch.unregister("toy")


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)


def packed_of(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = bb.prepare(model, bb.Recipe.bbq(2))
    model(torch.randn(4, *shape[1:]))
    return bb.convert(model.eval())


@pytest.fixture
def layer() -> nn.Module:
    return packed_of(nn.Linear(32, 8), (1, 32))


X = torch.linspace(-1, 1, 96).reshape(3, 32)
FIRST = "cpu" if native.available() else "reference"


def test_a_backend_of_higher_priority_is_asked_first_and_no_more_once_it_is_gone(layer):
    expected = layer(X)
    toy = Toy()
    dispatch.register(toy)
    try:
        assert dispatch.backends() == ["toy", "cpu", "triton"]
        assert torch.equal(layer(X), expected)  # a layer that has run already asks again
        assert toy.calls == 1
        assert str(layer.explain()) == "packed_linear: toy"
        assert bb.backend_report(nn.Sequential(layer)) == "0  packed_linear: toy"
        assert dispatch.kernels_of("packed_linear") == ["toy", *dispatch.kernels_of("unpack")]
        with torch.no_grad():
            assert torch.equal(layer(X.bfloat16()), layer(X.bfloat16().float()).bfloat16())
        assert toy.calls == 2  # it does not take bf16
    finally:
        dispatch.unregister("toy")
    assert dispatch.backends() == ["cpu", "triton"]
    assert torch.equal(layer(X), expected)
    assert toy.calls == 2
    assert layer.explain() == dispatch.Choice("packed_linear", FIRST, layer.explain().refused)


@pytest.mark.parametrize("before", [True, False])
def test_layers_that_share_an_input_ask_too(before):
    model = packed_of(Siblings(), (1, 32))
    expected = model(X) if before else None
    toy = Toy()
    dispatch.register(toy)
    try:
        found = model(X)
        assert toy.calls == 3
    finally:
        dispatch.unregister("toy")
    assert torch.equal(model(X), found if expected is None else expected)
    assert torch.equal(found, model(X))
    assert toy.calls == 3


def test_a_choice_says_who_runs_and_why_others_do_not(layer, toy):
    x = X.bfloat16()
    arguments = x, *layer.bound.tensors(), *layer.numbers, torch.float32
    backend, choice = packed_linear.operation.choose(arguments)
    assert choice.refused[0] == ("toy", "the input is torch.bfloat16")
    assert str(choice).startswith(f"packed_linear: {FIRST} (not toy: the input is torch.bfloat16")
    assert (backend is None) == (FIRST == "reference")
    double = packed_linear.operation.choose((X.double(), *arguments[1:]))
    assert double[0] is None
    assert double[1].backend == "reference"
    assert [name for name, _ in double[1].refused] == ["toy", "cpu", "triton"]
    conv = packed_of(nn.Conv2d(8, 8, 3, groups=2), (1, 8, 5, 5))
    assert ("toy", "knows one operation") in conv.explain().refused
    if native.available():
        assert ("cpu", "2 groups") in conv.explain().refused


def test_the_environment_forces_and_refuses(layer, toy, monkeypatch):
    expected = layer(X)
    assert toy.calls == 1
    for name in ("reference", "cpu") if native.available() else ("reference",):
        monkeypatch.setenv("BELLBOX_BACKEND", name)
        assert torch.equal(layer(X), expected)
        assert str(layer.explain()) == f"packed_linear: {name}"
    assert toy.calls == 1
    monkeypatch.setenv("BELLBOX_BACKEND", "toy")
    assert torch.equal(layer(X), expected)
    assert toy.calls == 2
    with pytest.raises(BellboxError, match=r"BELLBOX_BACKEND=toy does not take packed_linear: the input is"):
        layer(X.bfloat16())
    monkeypatch.setenv("BELLBOX_BACKEND", "abacus")
    for call in (
        lambda: layer(X),
        lambda: bb.ops.weight_layout.prepack(torch.zeros(1, 4, dtype=torch.uint8), 4),
    ):
        with pytest.raises(
            BellboxError, match=r"BELLBOX_BACKEND=abacus does not take .*: there is no such backend"
        ):
            call()
    monkeypatch.setenv("BELLBOX_BACKEND", "")
    assert torch.equal(layer(X), expected)
    assert toy.calls == 3


@pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
def test_a_forced_backend_says_what_it_has_no_kernel_for(monkeypatch):
    conv = packed_of(nn.Conv2d(8, 8, 3, groups=2), (1, 8, 5, 5))
    x = torch.ones(1, 8, 5, 5)
    conv(x)
    monkeypatch.setenv("BELLBOX_BACKEND", "cpu")
    with pytest.raises(BellboxError, match=r"BELLBOX_BACKEND=cpu does not take packed_conv2d: 2 groups"):
        conv(x)


def test_a_backend_of_the_same_name_replaces_the_other(toy, layer):
    other = Toy()
    dispatch.register(other)
    layer(X)
    assert dispatch.backends().count("toy") == 1
    assert (toy.calls, other.calls) == (0, 1)


def test_a_model_without_packed_layers_has_nothing_to_report():
    assert bb.backend_report(nn.Linear(2, 2)) == "no packed layer: convert the model first"
