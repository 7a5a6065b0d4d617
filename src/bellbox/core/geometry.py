"""Geometry of a convolution: where it looks, and the patches of an image as rows of a matrix.

Images lie channels last here, `[batch, height, width, channels]`, so that the channels of a pixel, which are rotated
together, are neighbours, and a patch is a few runs of memory. Padding is the number 0 in a patch of integers:
exactly what a padded zero contributes to the sum, whatever the levels are (half-integer levels have no code for
it, but their integers `2q` are multiplied, and 0 is a fine int8).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.errors import BellboxError

# Bytes of int8 patches at once: they are read right after they are written.
_PATCH_BYTES = 1 << 22


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a 2-D convolution with zero padding."""

    kernel: tuple[int, int]
    """Height and width."""
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Zeros on the left, right, top and bottom."""
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d) -> ConvGeometry:
        """That of a layer; one over a line is one over an image of height 1.

        Raises:
            BellboxError: padding with anything but zeros.
        """
        if conv.padding_mode != "zeros":
            raise BellboxError(
                f"padding_mode {conv.padding_mode!r}: only convolutions padded with zeros are quantized; "
                "leave this one out with keep=(...)"
            )
        left, right, *vertical = conv._reversed_padding_repeated_twice
        top, bottom = vertical or (0, 0)
        kernel, stride, dilation = map(_pair, (conv.kernel_size, conv.stride, conv.dilation))
        return cls(kernel, stride, (left, right, top, bottom), dilation, conv.groups)

    @property
    def is_line(self) -> bool:
        """Whether it may be that of a convolution over a line: height 1, and nothing above or below."""
        return self.kernel[0] == self.stride[0] == self.dilation[0] == 1 and not any(self.padding[2:])

    @property
    def is_pixel(self) -> bool:
        """Whether each output pixel sees one input pixel, and all of them in turn: a linear layer over pixels."""
        return self.kernel == self.stride == (1, 1) and not any(self.padding) and self.groups == 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output.

        Raises:
            BellboxError: the image is smaller than the geometry.
        """
        left, right, top, bottom = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        room = height + top + bottom - reach[0], width + left + right - reach[1]
        if min(room) < 0:
            raise BellboxError(
                f"an image of {height} x {width} is smaller than the convolution's geometry of {reach[0]} x {reach[1]}"
            )
        return room[0] // self.stride[0] + 1, room[1] // self.stride[1] + 1

    def numbers(self, height: int, width: int, channels: int) -> tuple[int, ...]:
        """What the compiled kernel is told: see `kernels.convolution.convolve`."""
        rows, columns = self.output_size(height, width)
        left, _, top, _ = self.padding
        sizes = (
            height,
            width,
            channels,
            rows,
            columns,
            *self.kernel,
            *self.stride,
            *self.dilation,
            left,
            top,
        )
        return (*sizes, int(any(self.padding)))

    def convolve(self, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.conv2d` of `[batch, channels, height, width]`."""
        left, right, top, bottom = self.padding
        padding = (top, left)
        if (left, top) != (right, bottom):
            image, padding = F.pad(image, self.padding), (0, 0)
        return F.conv2d(image, weight, bias, self.stride, padding, self.dilation, self.groups)

    def patches(self, image: Tensor) -> Tensor:
        """What each output pixel sees.

        Args:
            image: `[batch, height, width, channels]`, any dtype.

        Returns:
            `[groups, batch * out height * out width, kernel height * kernel width * channels / groups]`, channels
            innermost; a view where the geometry is one pixel.
        """
        batch, height, width, channels = image.shape
        rows, columns = self.output_size(height, width)
        if self.is_pixel:
            return image.reshape(1, -1, channels)
        left, right, top, bottom = self.padding
        if any(self.padding):
            image = F.pad(image, (0, 0, left, right, top, bottom))
        b, h, w, c = image.stride()
        depth = channels // self.groups
        view = image.as_strided(
            (self.groups, batch, rows, columns, *self.kernel, depth),
            (
                depth * c,
                b,
                h * self.stride[0],
                w * self.stride[1],
                h * self.dilation[0],
                w * self.dilation[1],
                c,
            ),
        )
        return view.reshape(self.groups, batch * rows * columns, -1)

    def some_patches(self, image: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`patches` of some samples at a time, so that their bytes stay few; with which samples they are."""
        batch, height, width, channels = image.shape
        rows, columns = self.output_size(height, width)
        size = rows * columns * self.kernel[0] * self.kernel[1] * channels * image.element_size()
        step = max(1, _PATCH_BYTES // max(1, size)) if image.device.type == "cpu" else max(1, batch)
        for start in range(0, batch, step):
            part = slice(start, min(batch, start + step))
            yield part, self.patches(image[part])


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def lines_as_images(x: Tensor, name: str) -> Tensor:
    """`[batch, channels, length]` as `[batch, channels, 1, length]`.

    Raises:
        BellboxError: an input of another rank.
    """
    if x.dim() != 3:
        raise BellboxError(
            f"input of {name or 'a convolution'} has shape {tuple(x.shape)}: [batch, channels, length] is needed"
        )
    return x.unsqueeze(2)


def pixels_of(x: Tensor, depth: int, name: str) -> Tensor:
    """`[batch, channels, height, width]` as `[batch, height * width * groups, depth]`, `depth` channels a group.

    Without a copy where `x` lies channels last.

    Raises:
        BellboxError: an input of another rank.
    """
    if x.dim() != 4:
        raise BellboxError(
            f"input of {name or 'a convolution'} has shape {tuple(x.shape)}: "
            "[batch, channels, height, width] is needed"
        )
    vectors = x.shape[1:].numel() // depth  # -1 is ambiguous for an empty batch
    return x.permute(0, 2, 3, 1).reshape(len(x), vectors, depth)
