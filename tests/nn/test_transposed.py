"""transformers' `Conv1D`: the linear layer with the transposed weight, bit for bit, under its owner's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.convert import unprepare
from bellbox.nn import PackedTransposed, QuantizedTransposed, WeightOnlyTransposed
from bellbox.recipe import Recipe

RECIPES = {
    "bbq": Recipe.bbq(2, keep_ends=False),
    "signs": Recipe.bbq(2, options={"signs": True}, keep_ends=False),
    "rotated in each forward": Recipe.bbq(2, weights_rotated=False, keep_ends=False),
    "lsq": Recipe.of("lsq", 2, keep_ends=False),
    "weights only": Recipe.of("nf", 4, weight_only="float", keep_ends=False),
}


@pytest.fixture(scope="module")
def conv1d() -> Any:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D


def transposed(conv1d: Any) -> Any:
    torch.manual_seed(0)
    return conv1d(48, 32)


def linear(layer: Any) -> nn.Linear:
    made = nn.Linear(32, 48)
    made.load_state_dict({"weight": layer.weight.T, "bias": layer.bias})
    return made


def rows() -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_linear_layer_that_it_is(conv1d: Any, name: str, tmp_path: Path) -> None:
    plain, x = transposed(conv1d), rows()
    theirs = bb.prepare(linear(plain), RECIPES[name])
    ours = bb.prepare(transposed(conv1d), RECIPES[name])
    given, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, other = ours(given), theirs(same)
    assert torch.equal(out, other)
    out.square().sum().backward()
    other.square().sum().backward()
    assert given.grad is not None
    assert same.grad is not None
    assert torch.equal(given.grad, same.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad.T)
    packed = bb.convert(ours.eval())
    with torch.no_grad():
        expected = ours(x)
        assert torch.equal(expected, theirs.eval()(x))
        assert torch.equal(packed(x), expected)
        assert torch.equal(packed.weight, bb.convert(theirs).weight.T)
        bb.save(packed, tmp_path / "m")
        for into in (transposed(conv1d), bb.prepare(transposed(conv1d), RECIPES[name]), packed):
            loaded = bb.load(tmp_path / "m", into=into)
            assert torch.equal(loaded(x), expected)
        exported = torch.export.export(packed, (x,))
        torch.export.save(exported, tmp_path / "m.pt2")
        assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), expected)


@pytest.mark.parametrize("name", ["bbq", "weights only"])
def test_its_owner_sees_its_own_class_and_shape(conv1d: Any, name: str, tmp_path: Path) -> None:
    plain = transposed(conv1d)
    model = bb.prepare(transposed(conv1d), RECIPES[name])
    assert isinstance(model, QuantizedTransposed)
    torch.testing.assert_close(model.weight.detach(), plain.weight.detach(), rtol=0, atol=1e-6)
    model(rows())
    packed = bb.convert(model.eval())
    assert isinstance(packed, PackedTransposed | WeightOnlyTransposed)
    bb.save(packed, tmp_path / "m")
    for layer in (model, packed, bb.load(tmp_path / "m", into=transposed(conv1d))):
        assert isinstance(layer, conv1d)
        assert not isinstance(layer, nn.Linear)
        assert layer.weight.shape == (32, 48)
        assert (layer.nf, layer.nx) == (48, 32)
        assert repr(layer) == "Conv1D(nf=48, nx=32)"
        assert type(type(layer)(4, 8)) is conv1d
    back = unprepare(model)
    assert type(back) is conv1d
    torch.testing.assert_close(back.weight.detach(), plain.weight.detach(), rtol=0, atol=1e-6)


def test_states_go_between_plain_and_prepared(conv1d: Any) -> None:
    model, x = bb.prepare(transposed(conv1d), RECIPES["bbq"]), rows()
    model(x)
    again = bb.prepare(conv1d(48, 32), RECIPES["bbq"])
    again.load_state_dict(model.state_dict())
    other = bb.prepare(conv1d(48, 32), RECIPES["bbq"])
    other.load_state_dict(transposed(conv1d).state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
        torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=1e-6)


def test_a_subclass_with_a_forward_of_its_own_is_left(conv1d: Any) -> None:
    class Own(conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    with pytest.warns(UserWarning, match="Own, a subclass of Conv1D with a forward of its own"):
        bb.prepare(nn.Sequential(Own(32, 32), nn.Linear(32, 32)), RECIPES["bbq"])
