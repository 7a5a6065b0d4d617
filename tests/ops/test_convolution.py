"""The packed convolution: code for code and bit for bit the fake-quantized one, on every instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import PackedConv2d
from bellbox.ops import native, packed_conv2d
from bellbox.quantizers import METHODS
from bellbox.recipe import Recipe

SHAPES = {
    "plain": (24, {"kernel_size": 3, "padding": 1}),
    "strided": (32, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "dilated": (16, {"kernel_size": (3, 2), "padding": (2, 1), "dilation": 2}),
    "wide padding": (8, {"kernel_size": 3, "padding": 4}),
    "unpadded": (40, {"kernel_size": (2, 3)}),
    "grouped": (16, {"kernel_size": 3, "padding": 1, "groups": 4}),
    "depthwise": (16, {"kernel_size": 3, "padding": 1, "groups": 16}),
    "pixel": (64, {"kernel_size": 1}),
    "pixel, strided": (48, {"kernel_size": 1, "stride": 2}),
    "same": (16, {"kernel_size": (2, 3), "padding": "same"}),
    "odd": (7, {"kernel_size": 5, "stride": 3, "padding": (1, 2)}),
}
PATHS = ["reference", *native.instruction_sets()]

pytestmark = [
    pytest.mark.filterwarnings("ignore:one input channel"),
    pytest.mark.filterwarnings("ignore:.*no factor of two"),
]


def trained(recipe: Recipe, shape: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    channels, options = SHAPES[shape]
    torch.manual_seed(seed)
    layer = bb.prepare(nn.Conv2d(channels, 48, **options), recipe)  # type: ignore[arg-type]
    x = torch.randn(5, channels, 9, 7) * torch.tensor([1.0, 0.1, 30.0, 0.0, 2.0])[:, None, None, None]
    layer(x)
    return layer.eval(), x


def run(packed: nn.Module, x: Tensor, path: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    assert isinstance(packed, PackedConv2d)
    with torch.no_grad():
        if path == "reference":
            monkeypatch.setenv("BELLBOX_BACKEND", "reference")
            assert packed.explain().backend == "reference"
            try:
                return packed(x)
            finally:
                monkeypatch.delenv("BELLBOX_BACKEND")
        with native.use(path):
            return packed(x)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_it_is_the_fake_quantized_one_to_the_last_bit(
    n: int, shape: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = trained(Recipe.bbq(levels=n), shape)
    packed = bb.convert(layer)
    with torch.no_grad():
        assert torch.equal(run(packed, x, path, monkeypatch), layer(x))
    codes = layer.input_codes(x)  # type: ignore[operator]
    assert torch.equal(packed.input_codes(x).flatten(), codes.flatten())  # type: ignore[operator]
    assert torch.equal(packed.weight_codes(), layer.weight_codes())  # type: ignore[operator]


# Channels, outputs, height, width, samples, options.
PIXELS = {
    "lines of half a tile": (16, 16, 4, 32, 2, {"kernel_size": 3, "padding": 1}),
    "lines of a tile": (6, 20, 3, 64, 1, {"kernel_size": 3, "padding": 1}),
    "lines of more than a tile": (8, 33, 2, 128, 1, {"kernel_size": 3, "padding": 1}),
    "many outputs": (32, 130, 6, 16, 2, {"kernel_size": 3, "padding": 1}),
    "many outputs, strided": (32, 144, 7, 16, 3, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "strided to half a tile": (3, 5, 8, 64, 1, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "strided to a tile": (3, 5, 4, 128, 1, {"kernel_size": 2, "padding": (0, 1), "stride": 2}),
    "odd strides": (4, 128, 9, 7, 4, {"kernel_size": 3, "padding": 1, "stride": 3}),
    "tiles across samples": (256, 128, 4, 4, 5, {"kernel_size": 3, "padding": 1}),
    "two sums of codes": (85, 144, 3, 8, 2, {"kernel_size": 3, "padding": 1}),
    "two pieces of lookups": (900, 16, 5, 8, 1, {"kernel_size": 3, "padding": 1}),
    "pixels, strided": (16, 32, 8, 8, 3, {"kernel_size": 1, "stride": 2}),
    "few pixels": (16, 130, 3, 3, 1, {"kernel_size": 3, "padding": 1}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", PIXELS)
@pytest.mark.parametrize("n", [3, 4])
def test_two_bits_in_tiles_of_pixels_are_the_fake_quantized_ones(
    n: int, case: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, outputs, height, width, samples, options = PIXELS[case]
    torch.manual_seed(0)
    layer = bb.prepare(nn.Conv2d(channels, outputs, **options), Recipe.bbq(levels=n))
    x = torch.randn(samples, channels, height, width)
    layer(x)
    with torch.no_grad():
        assert torch.equal(run(bb.convert(layer.eval()), x, path, monkeypatch), layer(x))


def test_an_instruction_set_with_other_weights_in_memory_takes_over() -> None:
    layer, x = trained(Recipe.bbq(), "plain")
    packed = bb.convert(layer)
    assert isinstance(packed, PackedConv2d)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(packed(x), expected)
        codes = packed.packed.clone()
        packed.packed.data.bitwise_not_()  # addresses of pixels were made of the codes: they follow
        other = packed(x)
        assert not torch.equal(other, expected)
        fixed = (
            packed.in_channels,
            packed_conv2d.geometry_numbers(packed.geometry),
            None,
            False,
            torch.float32,
        )
        arguments = x, *packed.bound.tensors(), *packed.numbers, *fixed
        assert torch.equal(packed_conv2d.operation(*arguments), other)
        packed.packed.data.copy_(codes)
        for path in [*native.instruction_sets()[::-1], *native.instruction_sets()]:
            with native.use(path):
                assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.on_grid])
def test_every_method_packs(method: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = trained(Recipe.of(method), "plain")
    with torch.no_grad():
        assert torch.equal(run(bb.convert(layer), x, path, monkeypatch), layer(x))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "recipe",
    [Recipe.bbq_vision(bits=2), Recipe.bbq(granularity="ema"), Recipe.bbq(options={"signs": True})],
    ids=["zeta", "ema", "signs"],
)
def test_every_granularity_and_option_packs(
    recipe: Recipe, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = trained(recipe, "strided")
    with torch.no_grad():
        assert torch.equal(run(bb.convert(layer), x, path, monkeypatch), layer(x))


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_that_is_not_finite_is_nan_and_the_others_are_not(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = trained(Recipe.bbq(), "plain")
    x[1, 2, 3, 4] = torch.inf
    packed = run(bb.convert(layer), x, path, monkeypatch)
    with torch.no_grad():
        expected = layer(x)
    assert packed[1].isnan().all()
    assert torch.equal(packed[0], expected[0])
    assert torch.equal(packed[2:], expected[2:])


def test_threads_layouts_and_dtypes_change_no_bit() -> None:
    layer, x = trained(Recipe.bbq(), "plain")
    x = x.repeat(40, 1, 1, 1)
    packed = bb.convert(layer)
    threads = torch.get_num_threads()
    with torch.no_grad():
        try:
            torch.set_num_threads(1)
            alone = packed(x)
            torch.set_num_threads(3)
            assert torch.equal(packed(x), alone)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(packed(x.to(memory_format=torch.channels_last)), alone)
        assert torch.equal(packed(x.bfloat16()), layer(x.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(packed)(x), alone)


def test_shapes_that_do_not_fit_are_refused() -> None:
    layer, _ = trained(Recipe.bbq(), "plain")
    packed = bb.convert(layer)
    for x in (torch.zeros(1, 8, 9, 9), torch.zeros(8, 9, 9), torch.zeros(1, 1, 24, 9, 9)):
        with pytest.raises(BellboxError, match="a packed convolution of 24 channels got shape"):
            packed(x)
