"""Layers whose weight a model reads past their forward: left whole and named, before the training or after it."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.nn import quantized_layers

RECIPE = bb.Recipe.bbq(2, granularity="token")


class Functional(nn.Module):
    """Reads one weight for itself, asks another for its dtype, and calls that one."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x.to(self.called.weight.dtype), self.read.weight, self.read.bias))


class Handed(nn.Module):
    """Reads it by a name that no source shows."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x @ getattr(self, "re" + "ad").weight.T)


def test_what_the_source_shows_is_left_at_once_and_named():
    model = nn.Sequential(Functional(), Functional())
    with pytest.warns(
        UserWarning, match=re.escape("0.read and 1 more 48% (its weight is read past its forward)")
    ):
        bb.prepare(model, RECIPE)
    assert [name for name, _ in quantized_layers(model)] == ["0.called", "1.called"]
    assert "left: *.read (2), 2,048 weights (its weight is read past its forward)" in bb.summary(model)


@pytest.mark.parametrize("rotated", [True, False])
def test_what_no_source_shows_is_left_by_convert(tmp_path, rotated: bool):
    recipe = bb.Recipe.bbq(2, granularity="token", weights_rotated=rotated)
    torch.manual_seed(0)
    model = bb.prepare(nn.Sequential(Handed(), Handed()), recipe)
    x = torch.randn(4, 32)
    model(x).square().sum().backward()
    model.eval()
    with pytest.warns(UserWarning, match="left in full precision: 0.read, 1.read"):
        packed = bb.convert(copy.deepcopy(model))
    assert type(packed.get_submodule("0.read")) is nn.Linear
    bb.save(packed, tmp_path / "m")
    loaded = bb.load(tmp_path / "m", into=nn.Sequential(Handed(), Handed()))
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
        assert torch.equal(loaded(x), packed(x))


@pytest.mark.parametrize("kind", [Functional, Handed])
def test_where_all_are_read_so_prepare_changes_nothing_and_convert_says_why(kind: type[nn.Module]):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 32)
    with torch.no_grad():
        before = model(x)
        bb.prepare(model, bb.Recipe.bbq(2, granularity="token", keep=("called",)))
        torch.testing.assert_close(model(x), before)
    with pytest.raises(bb.BellboxError, match="read never ran, and the model reads the weight past"):
        bb.convert(model)


class TiedDecoder(nn.Module):
    """Calls a layer and multiplies with its weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.middle = nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.middle(torch.relu(self.encode(x))), self.encode.weight.T)


class Nicknamed(TiedDecoder):
    """Likewise, by a name that no source shows."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.encode
        return F.linear(self.middle(torch.relu(layer(x))), layer.weight.T)


@pytest.mark.parametrize(("kind", "rotated"), [(TiedDecoder, True), (TiedDecoder, False), (Nicknamed, True)])
def test_a_weight_that_is_read_besides_a_call_is_named_by_convert(kind: type[nn.Module], rotated: bool):
    recipe = bb.Recipe.bbq(2, keep_ends=False, weights_rotated=rotated)
    x = torch.randn(4, 64)
    model = bb.prepare(kind(), recipe)
    model(x).square().sum().backward()
    with pytest.warns(UserWarning, match="encode: the model reads the weight for itself besides calling"):
        bb.convert(model.eval())


@pytest.mark.parametrize("rotated", [True, False])
def test_a_weight_that_is_looked_at_from_outside_or_asked_for_its_dtype_is_not(rotated: bool):
    recipe = bb.Recipe.bbq(2, keep_ends=False, weights_rotated=rotated)
    model = bb.prepare(Functional(), recipe)
    model(torch.randn(4, 32))
    assert model.called.weight.norm() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bb.convert(model.eval())


def test_an_expert_that_was_never_chosen_is_packed_all_the_same():
    experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    bb.prepare(experts, bb.Recipe.of("lsq", 2))
    experts[0](torch.randn(4, 32))
    with pytest.warns(UserWarning, match="no data ever reached 1 of 2"):
        packed = bb.convert(experts)
    assert not isinstance(packed[1], type(experts[1]))
    assert hasattr(packed[1], "packed")
