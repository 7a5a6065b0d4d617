"""Base of packed linear layers and convolutions: codes only, multiplied as integers, by one operation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from bellbox.core import packing
from bellbox.core.grid import Grid, Levels
from bellbox.errors import BellboxError
from bellbox.nn.coded import CodedLayer
from bellbox.nn.input_cache import PackedGroup, keeping_dtype
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.tools import is_guard
from bellbox.ops.dispatch import Choice
from bellbox.ops.packed_linear import encode_input
from bellbox.ops.weight_layout import packed_size, prepack_slabs, unpack
from bellbox.quantizers.nested import at_bits


@dataclass(frozen=True)
class InputCoding:
    """How a packed layer codes its input: everything but the numbers that lie in its buffers."""

    levels: Levels
    """Grid and thresholds that a new layer begins with; the thresholds in use are its buffer `act_thresholds`."""
    block: int = 1
    """Rotation block."""
    normalise: Literal["rms", "absmax", "norm", "static"] = "rms"
    """What a row is divided by: its RMS, its largest magnitude, or a stored number. `norm`: its RMS, and the product is
    multiplied by what gives the row's levels its L2 norm."""
    rescale: bool = False
    """Whether the product is multiplied by it again."""
    signs: bool = False
    """Whether entries change sign before the rotation, as stored signs say."""


class PackedLayer(CodedLayer):
    """A layer of integers: packed weight codes, and a rule for coding its input.

    Its buffers are all that it depends on: `packed` uint8, the codes in the layout of `ops.weight_layout`;
    `weight_scale` fp32 `[out]` and `act_scale` fp32 `[1]` (what one level is worth); `act_thresholds` fp32 `[n - 1]`;
    `act_rstd` fp32 `[1]` (`static` only); `act_signs` int8 (where there are signs); `bias` fp32 `[out]`.
    """

    packed: Tensor
    weight_scale: Tensor
    act_scale: Tensor
    act_thresholds: Tensor
    act_rstd: Tensor | None
    act_signs: Tensor | None
    places: int
    """Places of a filter's window; 1 of a linear layer."""
    widths: tuple[int, ...] = ()
    """Bits of the widths that a file of this layer can be read at, its own first; empty where it has one."""
    nested_inputs: bool = False
    """Whether inputs have the width of the weight, where there are several."""

    def _set_up(
        self, rows: int, columns: int, places: int, weight_levels: Grid, coding: InputCoding, bias: bool
    ) -> None:
        """Buffers of zeros. To be called after `nn.Module.__init__`."""
        self.row_count, self.row_length, self.places = rows, columns, places
        self.weight_levels, self.coding = weight_levels, coding
        self.group = PackedGroup()
        """Layers that are expected to read the same input."""
        size = packed_size(rows, columns, weight_levels.n, places)
        self.register_buffer("packed", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(rows))
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self.register_buffer("act_scale", torch.zeros(1))
        self.register_buffer("act_thresholds", torch.tensor(coding.levels.thresholds))
        self.register_buffer("act_rstd", torch.zeros(1) if coding.normalise == "static" else None)
        self.register_buffer(
            "act_signs", torch.ones(self.features, dtype=torch.int8) if coding.signs else None
        )
        self._bound: Any = None

    @property
    def features(self) -> int:
        """Entries of an input that are rotated together at most, and have their own signs."""
        return self.row_length // self.places

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The numbers of the operation, from `in_features` to `rescale` (`ops.packed_linear`)."""
        coding, levels = self.coding, self.weight_levels
        return (
            self.row_length, levels.n, levels.zero_point, coding.levels.zero_point, coding.block, coding.normalise,
            coding.rescale,
        )  # fmt: skip

    @abstractmethod
    def _bind(self) -> Any:
        """The operation on this layer's own dictionary of buffers."""

    @property
    def bound(self) -> Any:
        """The operation with all but the input fixed, made at its first use."""
        if self._bound is None:
            self._bound = self._bind()
        return self._bound

    def input_levels(self) -> Levels:
        """Grid and thresholds of the input, as the buffers have them now.

        Raises:
            BellboxError: thresholds that do not rise.
        """
        grid = self.coding.levels
        return Levels(grid.n, grid.zero_point, tuple(self.act_thresholds.tolist()))

    # --- the weight ---

    @abstractmethod
    def _as_weight(self, rows: Tensor) -> Tensor:
        """The float weight from the rows that are coded, in the rotated domain."""

    @torch.no_grad()
    def decoded_weight(self) -> Tensor:
        """fp32, in the shape of the plain layer's weight, rotated back."""
        levels = self.weight_levels.decode(self.weight_codes()) * self.weight_scale[:, None]
        return self._as_weight(levels)

    @property
    def stored_codes(self) -> Tensor:
        """See `CodedLayer`."""
        return self.packed

    def weight_codes(self) -> Tensor:
        """See `CodedLayer`."""
        return unpack(self.packed, self.row_count, self.row_length, self.weight_levels.n)

    @property
    def weight_packed(self) -> Tensor:
        """The codes as files hold them: uint8 `[row_count, row bytes]` (docs/format.md)."""
        return packing.pack(self.weight_codes(), self.weight_levels.n)

    def fill_from_rows(self, rows: Tensor) -> None:
        """Take codes as files hold them, a slab at a time."""
        slabs = packing.unpack_slabs(rows, self.row_length, self.weight_levels.n)
        self.packed = prepack_slabs(slabs, self.row_count, self.row_length, self.weight_levels.n, self.places)

    # --- several widths ---

    def narrower_scales(self) -> dict[str, Tensor]:
        """What a level is worth at the widths below this layer's own, as files name it: `weight_scale_2` fp32 `[out]`
        and, where inputs have the same width, `act_scale_2` fp32 `[1]`."""
        names = [f"{side}_scale_{bits}" for bits in self.widths[1:] for side in ("weight", "act")]
        found = {name: self._buffers.get(name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def keep_narrower(self, widths: Sequence[int], nested_inputs: bool, scales: Mapping[str, Tensor]) -> None:
        """Have what a file needs for narrower widths beside this one; their codes are prefixes of these codes.

        Args:
            widths: in bits, this layer's own first.
            nested_inputs: whether inputs have the width of the weight.
            scales: as `narrower_scales` gives them.
        """
        self.widths, self.nested_inputs = tuple(widths), nested_inputs
        for name, value in scales.items():
            self.register_buffer(name, value)

    def forget_narrower(self) -> None:
        """Be a layer of one width: files of it are those of any other."""
        for name in self.narrower_scales():
            del self._buffers[name]
        self.widths, self.nested_inputs = (), False

    def _keep_narrower_of(self, layer: QuantizedLayer, row_scales: Tensor) -> None:
        weight, inputs = layer.weight_quantizer, layer.activation_quantizer
        assert weight is not None
        assert inputs is not None
        own = weight.levels.n.bit_length() - 1
        narrower = [bits for bits in weight.widths if bits < own]
        scales: dict[str, Tensor] = {}
        for bits in narrower:
            with at_bits(weight, bits), at_bits(inputs.quantizer, bits):
                scales[f"weight_scale_{bits}"] = weight.packed_scales(row_scales, row_scales)
                if inputs.quantizer.widths:
                    scales[f"act_scale_{bits}"] = (
                        inputs.quantizer.scale().detach().reshape(1).to(torch.float32)
                    )
        if narrower:
            self.keep_narrower((own, *narrower), bool(inputs.quantizer.widths), scales)

    # --- making one ---

    @classmethod
    def from_quantized(cls, layer: QuantizedLayer, group: PackedGroup | None = None) -> PackedLayer:
        """Pack a trained layer.

        Raises:
            BellboxError: it cannot be packed; the message says why and what to do.
        """
        weight, activation = layer.weight_quantizer, layer.activation_quantizer
        if weight is None or activation is None:
            raise BellboxError("only layers with quantized weights and activations can be packed")
        for quantizer in (weight, activation.quantizer):
            if reason := quantizer.why_not_packed():
                raise BellboxError(f"{quantizer.name or 'a layer'} cannot be packed: {reason}")
        quantizer = activation.quantizer
        assert quantizer.normalise != "tensor"
        coding = InputCoding(
            quantizer.levels,
            quantizer.block,
            quantizer.normalise,
            quantizer.rescale,
            quantizer.signs is not None,
        )
        with torch.device(layer.stored_weight.device):
            made = cls.like(layer, weight.levels.grid, coding)
        encoded = layer.encoded_weight()
        for name, value in layer.packed_buffers(encoded).items():
            made._buffers[name] = value
        made._keep_narrower_of(layer, encoded[1])
        made.quantization_method = weight.method
        if group is not None:
            made.join(group)
        return made.train(layer.training)

    @classmethod
    @abstractmethod
    def like(cls, layer: QuantizedLayer, weight_levels: Grid, coding: InputCoding) -> Self:
        """An empty packed layer of the shape of a trained one."""

    def move_into(self, place: nn.Module) -> CodedLayer:
        """See `CodedLayer.move_into`; a group knows the layer by where it is now."""
        moved = super().move_into(place)
        self.group.layers = [moved if each is self else each for each in self.group.layers]
        return moved

    def join(self, group: PackedGroup) -> None:
        """Be one of the layers that are expected to read the same input."""
        self.group = group
        group.layers.append(self)

    # --- running ---

    @torch.no_grad()
    def _input_codes_of(self, rows: Tensor) -> Tensor:
        """uint8 codes of `[rows, features]`, signs not yet changed."""
        coding = self.coding
        return encode_input(
            rows,
            self.act_thresholds,
            self.act_rstd,
            coding.levels.zero_point,
            coding.block,
            coding.normalise,
            coding.rescale,
        )[0]

    @abstractmethod
    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes of an input, a row for each row (sample) that is coded."""

    @abstractmethod
    def explain(self) -> Choice:
        """Which backend takes a call on one fp32 row (one small image), and why others do not."""

    # --- state ---

    def __getstate__(self) -> dict[str, Any]:
        """A copy binds its own buffers, and takes along no more memory than it needs."""
        packed = self._buffers["packed"]
        if packed is not None and packed.untyped_storage().nbytes() > packed.nbytes:
            return {**self.__dict__, "_bound": None, "_buffers": {**self._buffers, "packed": packed.clone()}}
        return {**self.__dict__, "_bound": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if is_guard(state_dict.get(prefix + "weight")):
            del state_dict[prefix + "weight"]
        rows = state_dict.pop(prefix + "weight_packed", None)  # before version 0.2: rows as files have them
        if rows is not None:
            slabs = packing.unpack_slabs(rows, self.row_length, self.weight_levels.n)
            shape = self.row_count, self.row_length, self.weight_levels.n, self.places
            state_dict[prefix + "packed"] = prepack_slabs(slabs, *shape)
            state_dict.setdefault(prefix + "act_thresholds", torch.tensor(self.coding.levels.thresholds))
        for old, name in (("act_rsigma", "act_rstd"), ("act_scale", "act_scale")):
            value = state_dict.pop(prefix + old, None)
            if value is not None:
                state_dict[prefix + name] = value.reshape(1) if value.dim() == 0 else value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices, never a change of dtype: the scales are part of an exact function."""
        self._bound = None
        return super()._apply(keeping_dtype(fn), recurse)
