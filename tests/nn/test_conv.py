"""The fake-quantized convolution: geometry, gradients against float64, all methods, integers in evaluation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.convert import unprepare
from bellbox.core import hadamard as hadamard_module
from bellbox.core.geometry import ConvGeometry
from bellbox.errors import BellboxError
from bellbox.nn import QuantizedConv2d, quantized_layers
from bellbox.ops.encode import SIGMA_FLOOR
from bellbox.quantizers import METHODS
from bellbox.recipe import Recipe

SHAPES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": (3, 2), "padding": (2, 1), "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 4},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 16},
    "pixel": {"kernel_size": 1},
    "pixel, strided": {"kernel_size": 1, "stride": 2},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "even": {"kernel_size": 4, "stride": 3, "padding": (1, 2)},
}


def some_images(
    seed: int = 0, batch: int = 3, channels: int = 16, dtype: torch.dtype = torch.float32
) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, 7, 6, generator=draw, dtype=torch.float64)
    return (x * torch.linspace(0.2, 3, batch, dtype=torch.float64)[:, None, None, None]).to(dtype)


def some_conv(dtype: torch.dtype = torch.float32, **options: object) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(16, 32, **options).to(dtype)  # type: ignore[arg-type]


def prepared(recipe: Recipe, **options: object) -> QuantizedConv2d:
    layer = bb.prepare(some_conv(**options), recipe)  # type: ignore[type-var]
    assert isinstance(layer, QuantizedConv2d)
    return layer


def hadamard(vectors: Tensor, block: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return (vectors.unflatten(-1, (-1, block)) @ matrix / math.sqrt(block)).flatten(-2)


def bell_box(rows: Tensor, vectors: int, block: int, n: int, scale: Tensor, follow: bool) -> Tensor:
    """BBQ as METHODS describe it, in float64 and left to autograd: rows of vectors of a pixel's channels."""
    rotated = hadamard(rows.unflatten(-1, (-1, vectors)), block).flatten(-2)
    sigma = rotated.square().mean(-1, keepdim=True).sqrt().clamp(min=SIGMA_FLOOR)
    box = n * 0.5 * torch.erfc(-rotated / sigma / math.sqrt(2))
    level = box + (box.floor().clamp(0, n - 1) - box).detach() - n / 2 + (0.5 if n < 8 else 0.0)
    if not follow:
        gain = 1 / math.sqrt(rows.numel())
        scale = scale * gain + (scale * (1 - gain)).detach()
    return (scale * sigma if follow else scale) / (n / 2) * level


def reference(conv: nn.Conv2d, x: Tensor, n: int, scales: tuple[Tensor, Tensor], follow: bool) -> Tensor:
    """A quantized convolution in float64: BBQ of samples and of filters, then a plain convolution."""
    depth = conv.in_channels // conv.groups
    block = min(64, depth & -depth)
    pixels = x.permute(0, 2, 3, 1).flatten(1)
    image = (
        bell_box(pixels, depth, block, n, scales[1], follow)
        .view(len(x), *x.shape[2:], -1)
        .permute(0, 3, 1, 2)
    )
    filters = conv.weight.permute(0, 2, 3, 1).flatten(1)
    weight = bell_box(filters, depth, block, n, scales[0], follow)
    weight = weight.view(len(weight), *conv.kernel_size, depth).permute(0, 3, 1, 2)
    left, right, top, bottom = ConvGeometry.of(conv).padding
    image = F.pad(image, (left, right, top, bottom))
    return F.conv2d(image, weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


@pytest.mark.filterwarnings("ignore:one input channel")
@pytest.mark.parametrize("zeta", [None, 2.45])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 3, 4, 16])
def test_forward_and_gradients_are_those_of_the_formula_in_float64(
    n: int, shape: str, zeta: float | None
) -> None:
    conv = some_conv(torch.float64, **SHAPES[shape])
    layer = bb.prepare(copy.deepcopy(conv), Recipe.bbq_vision(levels=n, zeta=zeta))
    assert isinstance(layer, QuantizedConv2d)
    x, other = some_images(dtype=torch.float64), some_images(dtype=torch.float64)
    out = layer(x.requires_grad_())
    weight, activation = layer.weight_quantizer, layer.activation_quantizer
    if zeta is not None:
        scales = [torch.tensor(zeta, dtype=torch.float64)] * 2
    else:
        scales = [q.gamma.detach().double().requires_grad_() for q in (weight, activation)]  # type: ignore[union-attr]
    expected = reference(conv, other.requires_grad_(), n, (scales[0], scales[1]), zeta is not None)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    pairs = [(x.grad, other.grad), (layer.weight.grad, conv.weight.grad), (layer.bias.grad, conv.bias.grad)]  # type: ignore[union-attr]
    if zeta is None:
        pairs += [(q.gamma.grad, s.grad) for q, s in zip((weight, activation), scales, strict=True)]  # type: ignore[union-attr]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:one input channel")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [m for m, kind in METHODS.items() if kind.on_grid])
def test_in_evaluation_it_multiplies_integers_and_gives_the_dequantized_product(
    method: str, shape: str
) -> None:
    layer = prepared(Recipe.of(method), **SHAPES[shape])
    x = some_images()
    layer(x)
    layer.eval()
    assert layer.runs_on_integers
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer._dequantized(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["nf", "kmeans"])
def test_methods_whose_levels_are_uneven_run_on_floats(method: str) -> None:
    recipe = Recipe.of(method, bits=2, weight_only="int8" if method == "kmeans" else None)
    layer = prepared(recipe, kernel_size=3, padding=1)
    out = layer(some_images())
    out.sum().backward()
    assert not layer.runs_on_integers
    assert out.isfinite().all()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("shape", ["plain", "grouped", "pixel"])
def test_rotations_of_input_and_weight_cancel(shape: str) -> None:
    conv, x = some_conv(torch.float64, **SHAPES[shape]), some_images(dtype=torch.float64)
    fine = Recipe.of("bbq", levels=256, weight_only="float", options={"signs": True})
    layer = bb.prepare(copy.deepcopy(conv), fine)
    quantizer = layer.weight_quantizer  # type: ignore[union-attr]
    assert quantizer.block > 1
    layer.held_weight = (
        layer.rows_of(  # the weight rotated and not quantized: only the rotations are left to see
            layer._as_weight(quantizer.rotate(layer.weight_rows().detach()))
        )
    )
    torch.testing.assert_close(layer(x), conv(x))


def test_a_sample_does_not_depend_on_the_rest_of_its_batch() -> None:
    layer = prepared(Recipe.bbq(), kernel_size=3, padding=1)
    x = some_images()
    layer(x)
    layer.eval()
    changed = x.clone()
    changed[1:] *= 7
    with torch.no_grad():
        assert torch.equal(layer(x)[0], layer(changed)[0])


def test_weights_learned_rotated_give_the_same_function() -> None:
    plain = prepared(Recipe.bbq(), kernel_size=3, padding=1)
    rotated = prepared(Recipe.bbq(weights_rotated=True), kernel_size=3, padding=1)
    x = some_images()
    torch.testing.assert_close(plain(x), rotated(x))
    back = unprepare(rotated)
    torch.testing.assert_close(back.weight, some_conv(kernel_size=3, padding=1).weight)


def test_unprepare_gives_the_convolution_back() -> None:
    conv = some_conv(kernel_size=3, padding=1, stride=2, dilation=2, groups=2, bias=False)
    back = unprepare(bb.prepare(copy.deepcopy(conv), Recipe.bbq(weights_rotated=False)))
    assert type(back) is nn.Conv2d
    assert str(back) == str(conv)
    assert torch.equal(back(some_images()), conv(some_images()))
    rotated = unprepare(bb.prepare(copy.deepcopy(conv), Recipe.bbq()))
    assert torch.allclose(rotated.weight, conv.weight, atol=1e-6)


def test_stem_and_head_are_left_and_depthwise_layers_say_that_they_are_not_rotated() -> None:
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 16, 3),
            "conv1": nn.Conv2d(3, 16, 3),
            "patch_embed": nn.Conv2d(3, 16, 3),
            "block": nn.ModuleDict(
                {"conv1": nn.Conv2d(16, 16, 3), "depthwise": nn.Conv2d(16, 16, 3, groups=16)}
            ),
            "head": nn.Linear(16, 10),
        }
    )
    hadamard_module._warned.discard(1)
    with pytest.warns(UserWarning, match="depthwise convolutions are quantized without rotation"):
        bb.prepare(model, Recipe.bbq())
    assert [name for name, _ in quantized_layers(model)] == ["block.conv1", "block.depthwise"]


def test_rules_may_confine_themselves_to_a_kind_of_layer() -> None:
    recipe = Recipe.bbq_vision(bits=2)
    assert bb.recipe.recipe_from_dict(recipe.to_dict()) == recipe
    model = bb.prepare(nn.ModuleList([nn.Conv2d(128, 128, 3), nn.Linear(128, 128)]), recipe)
    blocks = [layer.activation_quantizer.quantizer.block for _, layer in quantized_layers(model)]  # type: ignore[union-attr]
    assert blocks == [64, 32]


def test_a_block_of_bbq_vision_is_that_of_convolutions_too_and_rotated_weights_have_none() -> None:
    def blocks(**choices: Any) -> list[int | None]:
        rule = Recipe.bbq_vision(2, **choices).rule_for("layer", "conv")
        assert rule is not None
        assert rule.weights is not None
        assert rule.activations is not None
        return [rule.weights.block, rule.activations.block]

    assert blocks() == [64, 64]
    assert blocks(block=1) == [1, 1]
    assert blocks(weights_rotated=True) == [1, 64]


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_an_empty_batch_gives_an_empty_one(kernel_size: int) -> None:
    layer = prepared(Recipe.bbq(), kernel_size=kernel_size)
    layer(some_images())
    empty = torch.zeros(0, 16, 8, 8)
    size = 9 - kernel_size
    assert layer.eval()(empty).shape == (0, layer.out_channels, size, size)
    packed = bb.convert(nn.Sequential(layer))
    assert packed(empty).shape == (0, layer.out_channels, size, size)


def test_an_image_may_come_without_a_batch() -> None:
    layer = prepared(Recipe.bbq(), kernel_size=3)
    images = some_images()
    layer(images)
    layer.eval()
    packed = bb.convert(nn.Sequential(layer))
    with torch.no_grad():
        assert torch.equal(layer(images[0]), layer(images)[0])
        assert torch.equal(packed(images[0]), packed(images)[0])
        assert torch.equal(torch.func.vmap(packed)(images), packed(images))
        beside = torch.randn(packed(images[0]).shape)
        added = packed[0](images[0], beside, relu=True)  # type: ignore[operator]
        assert torch.equal(added, (packed(images[0]) + beside).relu())


@pytest.mark.parametrize(
    ("conv", "x", "message"),
    [
        (
            {"padding": 1, "padding_mode": "reflect"},
            None,
            "padding_mode 'reflect': only convolutions",
        ),
        ({}, torch.zeros(16, 8), r"has shape \(16, 8\): \[batch, channels, height, width\] is needed"),
        ({}, torch.zeros(1, 8, 8, 8), "has 8 channels, 16 are needed"),
        (
            {},
            torch.zeros(1, 16, 2, 8),
            "an image of 2 x 8 is smaller than the convolution's window of 3 x 3",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    conv: dict[str, object], x: Tensor | None, message: str
) -> None:
    def run() -> None:
        layer = prepared(Recipe.bbq(), kernel_size=3, **conv)
        layer(some_images())
        layer.eval()(x)

    with pytest.raises(BellboxError, match=message):
        run()
