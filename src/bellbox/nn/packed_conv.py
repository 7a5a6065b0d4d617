"""The convolution for inference: codes only, each input element coded once, patches of integers multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.core.grid import Grid
from bellbox.errors import BellboxError
from bellbox.nn.geometry import ConvGeometry, pixels_of
from bellbox.nn.input_cache import InputCache
from bellbox.nn.packed_linear import InputCoding, PackedLinear, output_dtype, packed_layer, with_signs
from bellbox.nn.prepacked import Prepacked
from bellbox.nn.quantized_conv import QuantizedConv2d, integer_convolution
from bellbox.nn.quantized_linear import QuantizedLayer, epilogue
from bellbox.ops import convolution, native

_SIZES = 64
"""Sizes of images whose windows a layer remembers."""


def _codes_by_place(layer: PackedConv2d) -> Tensor:
    """Codes of the filters, `[out_channels, kernel height * kernel width, in_channels]`."""
    return layer.weight_codes().view(layer.out_features, -1, layer.features)


class _Filters:
    """What the compiled convolution needs of the codes besides the matrix, made once for the weights at hand."""

    def __init__(self, layer: PackedConv2d, ready: Prepacked) -> None:
        self.ready = ready
        self.code_sums = _codes_by_place(layer).sum(-1, dtype=torch.int32).t().contiguous()
        """int32 `[kernel height * kernel width, out_channels]`."""
        self._addresses: dict[int, Tensor] = {}

    def addresses(self, layer: PackedConv2d) -> Tensor | None:
        """`convolution.pixel_addresses`, where the instruction set in use has a use for them."""
        joined = convolution.convolves_pixels(layer.weight_levels, layer.coding.levels)
        if joined and joined not in self._addresses:
            self._addresses[joined] = convolution.pixel_addresses(_codes_by_place(layer), joined)
        return self._addresses.get(joined)


class PackedConv2d(PackedLinear):
    """A packed layer whose rows of weights are filters `[kernel height, kernel width, in_channels / groups]`.

    A sample `[height, width, in_channels]` is coded as one row. Padding is the integer 0.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        geometry: the geometry.
        weight_levels: the integers that weight codes stand for.
        coding: how the input is coded.
        bias: whether there is a bias.

    Its buffers are those of `PackedLinear`, with `in_features` weights a row and `out_features` rows; `act_signs` is
    int8 `[in_channels / groups]`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        geometry: ConvGeometry,
        weight_levels: Grid,
        coding: InputCoding,
        bias: bool,
        shared: InputCache | None = None,
    ) -> None:
        self.in_channels, self.geometry = in_channels, geometry
        pixels = geometry.kernel[0] * geometry.kernel[1]
        super().__init__(pixels * self.features, out_channels, weight_levels, coding, bias, shared)
        self._filters: _Filters | None = None
        self._windows: dict[tuple[int, int], list[int]] = {}
        self.folded = False
        """Whether a batch norm went into scale and bias (`fold_batch_norms`)."""

    def __getstate__(self) -> dict[str, Any]:
        """See `PackedLinear`."""
        return {**super().__getstate__(), "_filters": None, "_windows": {}}

    @classmethod
    def like(
        cls, layer: QuantizedLayer, weight_levels: Grid, coding: InputCoding, shared: InputCache | None
    ) -> PackedLinear:
        """See `PackedLinear.like`."""
        assert isinstance(layer, QuantizedConv2d)
        sizes = layer.in_channels, layer.out_channels, layer.geometry
        return cls(*sizes, weight_levels, coding, layer.bias is not None, shared)

    @property
    def features(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.geometry.groups

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        geometry = self.geometry
        return (
            f"{self.in_channels}, {self.out_features}, kernel_size={geometry.kernel}, stride={geometry.stride}, "
            f"padding={geometry.padding}, dilation={geometry.dilation}, groups={geometry.groups}, "
            f"bias={self.bias is not None}, weight_levels={self.weight_levels.n}, "
            f"activation_levels={self.coding.levels.n}"
        )

    def forward(self, x: Tensor, add: Tensor | float | None = None, relu: bool = False) -> Tensor:
        """`[batch, in_channels, height, width]` to `[batch, out_channels, out height, out width]`, without gradient.

        Args:
            x: the input.
            add: added to the result, in the same call where it has its shape and both are fp32.
            relu: whether a ReLU comes last, likewise.
        """
        self._check(x)
        if not (self.compiled and self.geometry.groups == 1 and native.takes(x)):
            return _ended(self._run_conv_reference(x, self._rows(x)), add, relu)
        if native.direct(x):
            return self.run_native_conv(x, output_dtype(x), add, relu)
        return _ended(torch.ops.bellbox.packed_conv2d(x, self._key, output_dtype(x)), add, relu)

    def run_native_conv(
        self, x: Tensor, wanted: torch.dtype, add: Tensor | float | None = None, relu: bool = False
    ) -> Tensor:
        """The compiled kernels: codes, product, epilogue, a second sum and a ReLU in one call."""
        ready = self.prepack()
        dtype = wanted if wanted in native.TYPES else torch.float32
        signs = self.act_signs
        image = x if signs is None else x * signs[:, None, None]
        height, width = x.shape[2:]
        geometry = self._windows.get((height, width))
        if geometry is None:
            if len(self._windows) >= _SIZES:
                self._windows.clear()
            geometry = self._windows[height, width] = list(
                self.geometry.numbers(height, width, self.in_channels)
            )
        filters = self._filters
        if filters is None or filters.ready is not ready:
            filters = self._filters = _Filters(self, ready)
        weights = ready.weights, filters.code_sums, filters.addresses(self)
        if wanted != torch.float32 or (add is not None and not self._can_add(add, len(x), geometry)):
            out = convolution.convolve(image, geometry, *weights, ready.act_scale, ready.coding, dtype)
            return _ended(out.to(wanted), add, relu)
        assert add is None or isinstance(add, Tensor)
        return convolution.convolve(
            image, geometry, *weights, ready.act_scale, ready.coding, dtype, add, relu
        )

    @torch.no_grad()
    def _run_conv_reference(self, x: Tensor, rows: Tensor) -> Tensor:
        codes, row_scales = self.coding.encode(rows, self.act_rstd, None)
        image = self.coding.levels.decode_int8(codes).view(len(x), *x.shape[2:], self.in_channels)
        weight_scale = self.weight_scale / self.weight_levels.multiplier
        act_scale = self.act_scale / self.coding.levels.multiplier
        product = integer_convolution(
            image, self._weight_integers(), weight_scale, act_scale, row_scales, self.geometry
        )
        return epilogue(product, self.bias, x).permute(0, 3, 1, 2)

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes `[batch, height * width * in_channels]` of an input, from the very path that a forward takes."""
        self._check(x)
        rows, coding = self._rows(x), self.coding
        if not (self.compiled and native.takes(x)):
            return coding.encode(rows, self.act_rstd, None)[0]
        integers, _, _ = native.encode(rows.detach(), *self.coding_arguments())
        return ((integers - coding.levels.integers[0]) // coding.levels.multiplier).to(torch.uint8)

    def _can_add(self, add: Tensor | float, batch: int, geometry: list[int]) -> bool:
        if not isinstance(add, Tensor) or not native.direct(add) or add.dtype != torch.float32:
            return False
        # The compiled kernels return nothing that a gradient could pass through.
        learned = add.requires_grad and torch.is_grad_enabled()
        return not learned and add.shape == (batch, self.out_features, geometry[3], geometry[4])

    def _rows(self, x: Tensor) -> Tensor:
        """A row a sample, channels innermost, signs changed."""
        return with_signs(pixels_of(x, self.features, ""), self.act_signs).flatten(1)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point() or x.dim() != 4 or x.shape[1] != self.in_channels:
            raise BellboxError(
                f"a packed convolution of {self.in_channels} channels got shape {tuple(x.shape)}, dtype {x.dtype}: "
                "[batch, channels, height, width] is needed"
            )


def _ended(out: Tensor, add: Tensor | float | None, relu: bool) -> Tensor:
    out = out if add is None else out + add
    return F.relu(out) if relu else out


# As `bellbox::packed_linear`: a graph holds the layer's key.
_library = torch.library.Library("bellbox", "FRAGMENT")
_library.define("packed_conv2d(Tensor x, int key, ScalarType dtype) -> Tensor")


def _convolution(key: int) -> PackedConv2d:
    layer = packed_layer(key)
    assert isinstance(layer, PackedConv2d)
    return layer


def _packed_conv2d(x: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    return _convolution(key).run_native_conv(x, dtype)


def _packed_conv2d_fake(x: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    layer = _convolution(key)
    size = len(x), layer.out_features, *layer.geometry.output_size(x.shape[2], x.shape[3])
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)


_library.impl("packed_conv2d", _packed_conv2d, "CPU")
torch.library.register_fake("bellbox::packed_conv2d", _packed_conv2d_fake, lib=_library)
