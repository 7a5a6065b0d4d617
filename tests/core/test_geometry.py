"""Where a convolution looks: sizes, patches and flags against torch's own convolution and plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.core.geometry import ConvGeometry, lines_as_images, pixels_of
from bellbox.errors import BellboxError

# Every pair of numbers differs: height and width, left and right cannot be taken for one another.
GEOMETRIES = {
    "plain": ConvGeometry((2, 3)),
    "strided": ConvGeometry((2, 3), stride=(3, 2)),
    "dilated": ConvGeometry((3, 2), dilation=(1, 3)),
    "padded": ConvGeometry((2, 3), padding=(1, 2, 3, 0)),
    "grouped": ConvGeometry((3, 1), groups=2),
    "pixel": ConvGeometry((1, 1)),
    "pixel, grouped": ConvGeometry((1, 1), groups=2),
    "pixel, strided": ConvGeometry((1, 1), stride=(1, 2)),
    "all": ConvGeometry((3, 2), (2, 3), (2, 1, 0, 3), (2, 4), 2),
}


def image_of(height: int = 9, width: int = 11, batch: int = 2, channels: int = 4) -> Tensor:
    """`[batch, height, width, channels]`, each number once."""
    return torch.arange(1.0, batch * height * width * channels + 1).view(batch, height, width, channels)


def seen_by_loops(geometry: ConvGeometry, image: Tensor) -> Tensor:
    """`patches`, number by number."""
    batch, height, width, channels = image.shape
    (kernel_h, kernel_w), (left, right, top, bottom) = geometry.kernel, geometry.padding
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.stride, geometry.dilation
    rows = (height + top + bottom - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (width + left + right - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    depth = channels // geometry.groups
    found = []
    for group, b, i, j in itertools.product(
        range(geometry.groups), range(batch), range(rows), range(columns)
    ):
        patch = []
        for di, dj, c in itertools.product(range(kernel_h), range(kernel_w), range(depth)):
            y, x = i * stride_h + di * dilation_h - top, j * stride_w + dj * dilation_w - left
            inside = 0 <= y < height and 0 <= x < width
            patch.append(float(image[b, y, x, group * depth + c]) if inside else 0.0)
        found.append(patch)
    return torch.tensor(found).view(geometry.groups, batch * rows * columns, -1)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_are_what_a_loop_sees(name):
    geometry, image = GEOMETRIES[name], image_of()
    assert torch.equal(geometry.patches(image), seen_by_loops(geometry, image))
    turned = image.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)  # other strides, the same numbers
    assert torch.equal(geometry.patches(turned), geometry.patches(image))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_convolution_is_that_of_the_padded_image(name):
    geometry = GEOMETRIES[name]
    image = image_of().permute(0, 3, 1, 2)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4 // geometry.groups, *geometry.kernel, generator=draw)
    bias = torch.randn(6, generator=draw)
    padded = F.pad(image, geometry.padding)
    rest = {"stride": geometry.stride, "dilation": geometry.dilation, "groups": geometry.groups}
    expected = F.conv2d(padded, weight, bias, **rest)
    torch.testing.assert_close(geometry.convolve(image, weight, bias), expected)
    assert geometry.output_size(9, 11) == tuple(expected.shape[2:])


def test_equal_padding_is_left_to_the_convolution():
    geometry = ConvGeometry((3, 3), padding=(1, 1, 2, 2))
    image, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 3, 3)
    expected = F.conv2d(image, weight, None, padding=(2, 1))
    torch.testing.assert_close(geometry.convolve(image, weight, None), expected)


def test_an_image_as_small_as_the_geometry_gives_one_pixel_and_a_smaller_one_is_refused():
    geometry = ConvGeometry((3, 2), dilation=(2, 3), padding=(1, 0, 0, 2))
    assert geometry.output_size(3, 3) == (1, 1)
    assert geometry.output_size(4, 5) == (2, 3)
    for height, width in ((2, 3), (3, 2), (2, 9), (9, 2)):
        with pytest.raises(BellboxError, match=f"{height} x {width} is smaller than .* 5 x 4"):
            geometry.output_size(height, width)


def test_the_compiled_kernel_is_told_all_numbers_in_its_order():
    geometry = ConvGeometry((3, 2), (2, 3), (6, 1, 5, 3), (1, 4))
    assert geometry.numbers(9, 11, 7) == (9, 11, 7, 8, 5, 3, 2, 2, 3, 1, 4, 6, 5, 1)
    assert ConvGeometry((1, 1)).numbers(2, 3, 4)[-1] == 0
    assert ConvGeometry((1, 1), padding=(0, 1, 0, 0)).numbers(2, 3, 4)[-1] == 1


@pytest.mark.parametrize(
    ("geometry", "line", "pixel"),
    [
        (ConvGeometry((1, 1)), True, True),
        (ConvGeometry((1, 3), (1, 2), (2, 1, 0, 0), (1, 2), 2), True, False),
        (ConvGeometry((2, 1)), False, False),
        (ConvGeometry((1, 1), (2, 1)), False, False),
        (ConvGeometry((1, 1), (1, 2)), True, False),
        (ConvGeometry((1, 1), dilation=(2, 1)), False, True),
        (ConvGeometry((1, 1), padding=(0, 0, 1, 0)), False, False),
        (ConvGeometry((1, 1), padding=(0, 0, 0, 1)), False, False),
        (ConvGeometry((1, 1), padding=(0, 1, 0, 0)), True, False),
        (ConvGeometry((1, 1), groups=2), True, False),
    ],
)
def test_which_geometries_are_a_line_and_which_a_pixel(geometry, line, pixel):
    assert geometry.is_line == line
    assert geometry.is_pixel == pixel


def test_a_pixel_is_a_view_and_the_channels_stay_innermost():
    image = image_of()
    patches = ConvGeometry((1, 1)).patches(image)
    assert patches.shape == (1, 2 * 9 * 11, 4)
    assert patches.data_ptr() == image.data_ptr()


def test_some_patches_are_few_bytes_and_together_all():
    geometry = ConvGeometry((5, 4))
    image = torch.zeros(7, 68, 67, 16, dtype=torch.int8)  # 64 x 64 x 20 x 16 bytes a sample: three in 4 MiB
    image.random_(-5, 6, generator=torch.Generator().manual_seed(0))
    parts = list(geometry.some_patches(image))
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 3), (3, 6), (6, 7)]
    assert torch.equal(torch.cat([found for _, found in parts], 1), geometry.patches(image))
    wide = list(geometry.some_patches(image.float()))
    assert [(part.start, part.stop) for part, _ in wide] == [(i, i + 1) for i in range(7)]
    assert list(geometry.some_patches(image[:0])) == []
    nowhere = torch.empty(image.shape, device="meta")  # elsewhere than on a CPU all samples go at once
    assert [part for part, _ in geometry.some_patches(nowhere)] == [slice(0, 7)]
    assert list(geometry.some_patches(nowhere[:0])) == []


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, (2, 3), (3, 2), (1, 2), (2, 1), 2),
        nn.Conv2d(4, 6, (2, 3), padding="same"),
        nn.Conv1d(4, 6, 3, 2, 1, 2, 2),
        nn.Conv1d(4, 6, 4, padding="same"),
    ],
    ids=str,
)
def test_a_layers_geometry_gives_its_output(conv):
    geometry = ConvGeometry.of(conv)
    line = isinstance(conv, nn.Conv1d)
    x = torch.randn(2, 4, 11) if line else torch.randn(2, 4, 9, 11)
    weight = conv.weight.unsqueeze(2) if line else conv.weight
    found = geometry.convolve(lines_as_images(x, "") if line else x, weight, conv.bias)
    torch.testing.assert_close(found.squeeze(2) if line else found, conv(x))
    assert geometry.is_line == line


def test_padding_with_anything_but_zeros_is_refused():
    with pytest.raises(BellboxError, match="padding_mode 'reflect'"):
        ConvGeometry.of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))


def test_pixels_and_lines_are_what_they_say():
    x = torch.arange(2.0 * 6 * 3 * 5).view(2, 6, 3, 5)
    found = pixels_of(x, 2, "conv")
    assert found.shape == (2, 3 * 5 * 3, 2)
    for b, y, column, group in itertools.product(range(2), range(3), range(5), range(3)):
        vector = found[b, (y * 5 + column) * 3 + group]
        assert torch.equal(vector, x[b, 2 * group : 2 * group + 2, y, column])
    assert pixels_of(x[:0], 2, "conv").shape == (0, 45, 2)
    assert torch.equal(lines_as_images(x[0], "conv"), x[0].view(6, 3, 1, 5))
    for wrong in (x, x[0, 0]):
        with pytest.raises(BellboxError, match=r"input of conv has shape .*\[batch, channels, length\]"):
            lines_as_images(wrong, "conv")
    for wrong in (x[0], x[None]):
        with pytest.raises(BellboxError, match="input of a convolution has shape"):
            pixels_of(wrong, 2, "")
