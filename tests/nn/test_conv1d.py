"""Convolutions over lines: those over images of height 1, bit for bit, in training, evaluation, packed and on disk."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.convert import unprepare
from bellbox.errors import BellboxError
from bellbox.nn import PackedConv1d, QuantizedConv1d, QuantizedConv2d
from bellbox.recipe import Recipe

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 5, "padding": 2, "stride": 2, "bias": False},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "groups": 4},
    "depthwise": {"kernel_size": 4, "padding": 3, "groups": 16},
    "point": {"kernel_size": 1},
    "same": {"kernel_size": 4, "padding": "same"},
}
RECIPES = {
    "bbq": Recipe.bbq(2, keep_ends=False),
    "signs": Recipe.bbq(2, options={"signs": True}, keep_ends=False),
    "running": Recipe.bbq(3, granularity="ema", weights_rotated=False, keep_ends=False),
    "lsq": Recipe.of("lsq", 2, keep_ends=False),
}
pytestmark = pytest.mark.filterwarnings("ignore:one input channel a group")


def line(**shape: Any) -> nn.Conv1d:
    torch.manual_seed(1)
    return nn.Conv1d(16, 32, **shape)


def image(conv: nn.Conv1d) -> nn.Conv2d:
    """The same convolution over images of height 1."""
    padding: Any = conv.padding if isinstance(conv.padding, str) else (0, *conv.padding)
    sizes = {"stride": (1, *conv.stride), "dilation": (1, *conv.dilation), "groups": conv.groups}
    made = nn.Conv2d(16, 32, (1, *conv.kernel_size), padding=padding, bias=conv.bias is not None, **sizes)  # type: ignore[arg-type]
    state = {name: t.unsqueeze(2) if name == "weight" else t for name, t in conv.state_dict().items()}
    made.load_state_dict(state)
    return made


def some_lines() -> Tensor:
    draw = torch.randn(3, 16, 21, generator=torch.Generator().manual_seed(0))
    return draw * torch.tensor([0.2, 1.0, 3.0])[:, None, None]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_line_is_an_image_of_height_1(shape: str, recipe: str, tmp_path: Path) -> None:
    plain, x = line(**SHAPES[shape]), some_lines()
    ours, theirs = (
        bb.prepare(line(**SHAPES[shape]), RECIPES[recipe]),
        bb.prepare(image(plain), RECIPES[recipe]),
    )
    assert isinstance(ours, QuantizedConv1d)
    assert isinstance(theirs, QuantizedConv2d)
    torch.testing.assert_close(ours.weight.detach(), plain.weight.detach(), rtol=0, atol=1e-6)
    given, same = x.clone().requires_grad_(), x.unsqueeze(2).requires_grad_()
    out, other = ours(given), theirs(same)
    assert torch.equal(out, other.squeeze(2))
    out.square().sum().backward()
    other.square().sum().backward()
    assert given.grad is not None
    assert same.grad is not None
    assert torch.equal(given.grad, same.grad.squeeze(2))
    grads = [p.grad for p in theirs.parameters()]
    for p, grad in zip(ours.parameters(), grads, strict=True):
        assert p.grad is not None
        assert grad is not None
        torch.testing.assert_close(p.grad, grad.view(p.shape), rtol=1e-5, atol=1e-5)
    packed = bb.convert(ours.eval())
    with torch.no_grad():
        expected = ours(x)
        assert torch.equal(expected, theirs.eval()(x.unsqueeze(2)).squeeze(2))
        assert torch.equal(packed(x), expected)
        assert torch.equal(packed.input_codes(x), bb.convert(theirs).input_codes(x.unsqueeze(2)))
        bb.save(packed, tmp_path / "m")
        loaded = bb.load(tmp_path / "m", into=line(**SHAPES[shape]))
        assert isinstance(loaded, PackedConv1d)
        assert torch.equal(loaded(x), expected)
        assert torch.equal(loaded.weight, packed.weight)
        assert loaded.weight.shape == plain.weight.shape


def test_what_its_owner_asks_for_stays() -> None:
    plain = line(kernel_size=5, padding=2, stride=2, dilation=3)
    asked = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "output_padding")
    before = {name: getattr(plain, name) for name in asked}
    model = bb.prepare(plain, RECIPES["bbq"])
    model(some_lines())
    packed = bb.convert(model.eval())
    for layer in (model, packed):
        assert isinstance(layer, nn.Conv1d)
        assert {name: getattr(layer, name) for name in before} == before
        assert type(type(layer)(4, 4, 3)) is nn.Conv1d
    assert type(unprepare(model)) is nn.Conv1d


def test_a_packed_line_is_stored_as_a_convolution_of_height_1(tmp_path: Path) -> None:
    model = bb.prepare(line(kernel_size=5, padding=2, stride=2), RECIPES["bbq"])
    model(some_lines())
    bb.save(bb.convert(model.eval()), tmp_path / "m")
    section = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert section["version"] == 4
    assert section["layers"][""]["function"] == "packed_conv2d"
    assert section["layers"][""]["convolution"] == {
        "channels": 16, "groups": 1, "kernel": [1, 5], "stride": [1, 2], "padding": [2, 2, 0, 0], "dilation": [1, 1],
    }  # fmt: skip
    with pytest.raises(BellboxError, match=r"in the file and .* in the model"):
        bb.load(tmp_path / "m", into=line(kernel_size=5, padding=1, stride=2))


class Stepwise(nn.Module):
    """Calls its convolution, and reads its weight for a step of decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(32, 32, 3), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).transpose(1, 2))

    def step(self, last: Tensor) -> Tensor:
        return self.linear((last * self.conv.weight[0]).sum(-1))


def test_what_cannot_be_a_packed_line_is_left_and_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.around = nn.Conv1d(32, 32, 3, padding=1, padding_mode="circular")
            self.stepwise, self.solid = Stepwise(), nn.Conv3d(32, 32, 3)

    with pytest.warns(UserWarning, match="prepared") as heard:
        bb.prepare(Net(), Recipe.bbq(2, keep_ends=False))
    for part in (
        "around .*Conv1d padded with circular",
        "stepwise.conv .*its weight is read",
        "solid .*Conv3d",
    ):
        assert any(re.search(part, str(each.message)) for each in heard), part


@pytest.mark.parametrize("shape", [(21,), (8, 21), (3, 8, 21), (3, 16, 2), (1, 3, 16, 21)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = bb.prepare(line(kernel_size=3), RECIPES["bbq"])
    model(some_lines())
    for layer in (model, model.eval(), bb.convert(model)):
        with pytest.raises(BellboxError, match=r"needed|smaller"):
            layer(torch.randn(shape))


def test_a_line_may_come_without_a_batch() -> None:
    model = bb.prepare(line(kernel_size=3), RECIPES["bbq"])
    model(some_lines())
    model.eval()
    whole, one = some_lines(), some_lines()[0]
    with torch.no_grad():
        for layer in (model, bb.convert(model)):
            assert torch.equal(layer(one), layer(whole)[0])
        model.train()
        assert torch.equal(model(one), model(one[None])[0])


class Causal(nn.Module):
    """Convolutions over tokens; the second is padded outside, which nothing but the model's word shows."""

    def __init__(self, generates: bool) -> None:
        super().__init__()
        self.linear, self.full = nn.Linear(32, 32), nn.Conv1d(32, 32, 3, padding=2)
        self.bare, self.head = nn.Conv1d(32, 32, 3), nn.Linear(32, 5)
        self.generates = generates

    def can_generate(self) -> bool:
        return self.generates

    def forward(self, x: Tensor) -> Tensor:
        x = self.full(self.linear(x).transpose(1, 2))[..., :-2]
        return self.head(self.bare(nn.functional.pad(x, (2, 0))).transpose(1, 2))


@pytest.mark.parametrize("generates", [False, True])
def test_a_convolution_that_must_not_look_ahead_is_left(generates: bool) -> None:
    model = bb.prepare(Causal(generates), Recipe.bbq(2))
    assert type(model.full) is nn.Conv1d
    assert isinstance(model.bare, QuantizedConv1d) is not generates
    assert "left: full, 3,072 weights (its tokens would see each other in one scale)" in bb.summary(model)
    x = torch.randn(2, 9, 32)
    model(x)
    packed, changed = bb.convert(model.eval()), x.clone()
    changed[:, 5:] = 1
    with torch.no_grad():
        same = torch.equal(packed(x)[:, :5], packed(changed)[:, :5])
    assert same is generates  # what only the user knows is theirs to say: keep=, or granularity="ema"
    running = dataclasses.replace(Recipe.bbq(2, granularity="ema").rules[-1], pattern="*full")
    asked = bb.prepare(Causal(True), Recipe.bbq(2, rules=(running,)))
    assert isinstance(asked.full, QuantizedConv1d)
    asked(x)
    causal = bb.convert(asked.eval())
    with torch.no_grad():
        assert torch.equal(causal(x)[:, :5], causal(changed)[:, :5])
