"""The layer for inference: codes only, multiplied as integers by the compiled kernels or by the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from bellbox.core import packing
from bellbox.core.grid import Grid, Levels
from bellbox.errors import BellboxError
from bellbox.nn.input_cache import InputCache, keeping_dtype, version_of
from bellbox.nn.prepacked import Prepacked
from bellbox.nn.quantized_linear import QuantizedLayer, epilogue
from bellbox.ops import native
from bellbox.ops.encode import MEASURES, compute_dtype, encode, normaliser, row_scale, static_normaliser
from bellbox.ops.integer import scaled_product


@dataclass(frozen=True)
class InputCoding:
    """How a packed layer codes its input: everything but the numbers that lie in its buffers."""

    levels: Levels
    block: int = 1
    """Rotation block."""
    normalise: Literal["rms", "absmax", "static"] = "rms"
    """What a row is divided by: its RMS, its largest magnitude, or a stored number."""
    rescale: bool = False
    """Whether the product is multiplied by it again."""
    signs: bool = False
    """Whether entries change sign before the rotation, as stored signs say."""

    def encode(self, rows: Tensor, rstd: Tensor | None, signs: Tensor | None) -> tuple[Tensor, Tensor]:
        """uint8 codes `[rows, features]` and fp32 row_scales `[rows, 1]` of float rows."""
        rows, sigma = with_signs(rows, signs), None
        if self.normalise == "static":
            assert rstd is not None
            r = static_normaliser(rstd, rows, self.block)
        else:
            sigma = MEASURES[self.normalise](rows)
            r = normaliser(sigma, self.block)
        r = r.to(compute_dtype(rows))
        codes = encode(rows, r, self.levels.thresholds, self.block)
        return codes, row_scale(r, len(rows), sigma if self.rescale else None)


def with_signs(x: Tensor, signs: Tensor | None) -> Tensor:
    """`x` with the sign of each entry of a row changed where `signs` is -1."""
    return x if signs is None else x * signs


class PackedLinear(nn.Module):
    """A linear layer of integers: packed weight codes, and a rule for coding its input.

    Args:
        in_features: length of the last dimension of the input.
        out_features: length of the last dimension of the output.
        weight_levels: the integers that weight codes stand for.
        coding: how the input is coded.
        bias: whether there is a bias.
        shared: memory of the siblings that read the same input.

    Its buffers are what `docs/format.md` stores: `weight_packed` uint8 `[out, row bytes]`, `weight_scale` fp32 `[out]`
    and `act_scale` fp32 `[]` (what one level is worth), `act_rstd` fp32 `[]` (`static` only), `act_signs` int8 `[in]`
    (where there are signs), `bias` fp32 `[out]`.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    act_scale: Tensor
    act_rstd: Tensor | None
    act_signs: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_levels: Grid,
        coding: InputCoding,
        bias: bool,
        shared: InputCache | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_levels, self.coding = weight_levels, coding
        self.shared = shared or InputCache()
        self.shared.members.append(self)
        size = packing.row_bytes(in_features, weight_levels.n)
        self.register_buffer("weight_packed", torch.zeros(out_features, size, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(out_features))
        self.register_buffer("act_scale", torch.zeros(()))
        self.register_buffer("act_rstd", torch.zeros(()) if coding.normalise == "static" else None)
        self.register_buffer(
            "act_signs", torch.ones(self.features, dtype=torch.int8) if coding.signs else None
        )
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._integers: tuple[Tensor, int, Tensor] | None = None
        self._prepacked: Prepacked | None = None
        self._key = _register(self)
        # Whether the compiled kernels serve it. Asked once: a compiler that traces the forward cannot look.
        self.compiled = native.can_multiply(weight_levels, coding.levels)

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its own weights."""
        return {**self.__dict__, "_prepacked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has its own key."""
        super().__setstate__(state)
        self._key = _register(self)
        # Here, not where it was saved.
        self.compiled = native.can_multiply(self.weight_levels, self.coding.levels)

    @classmethod
    def from_quantized(cls, layer: QuantizedLayer, shared: InputCache | None = None) -> PackedLinear:
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
        codes, row_scales = layer.encoded_weight()
        quantizer, bias = activation.quantizer, layer.bias
        normalise, signs = quantizer.normalise, quantizer.signs
        assert normalise != "tensor"
        coding = InputCoding(
            quantizer.levels, quantizer.block, normalise, quantizer.rescale, signs is not None
        )
        packed = cls.like(layer, weight.levels.grid, coding, shared)
        packed.to(layer.weight.device)
        packed.weight_packed.copy_(packing.pack(codes, weight.levels.n))
        packed.weight_scale.copy_((weight.scale() * row_scales).reshape(-1))
        packed.act_scale.copy_(quantizer.scale().reshape(()))
        if packed.act_rstd is not None:
            packed.act_rstd.copy_(quantizer.rstd().reshape(()))
        if packed.act_signs is not None and signs is not None:
            packed.act_signs.copy_(signs)
        if bias is not None and packed.bias is not None:
            packed.bias.copy_(bias.detach())
        return packed.train(layer.training)

    @classmethod
    def like(
        cls, layer: QuantizedLayer, weight_levels: Grid, coding: InputCoding, shared: InputCache | None
    ) -> PackedLinear:
        """An empty packed layer of the shape of a trained one."""
        return cls(layer.row_length, layer.row_count, weight_levels, coding, layer.bias is not None, shared)

    @property
    def features(self) -> int:
        """Entries of an input that are rotated together at most, and have their own signs."""
        return self.in_features

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight_levels={self.weight_levels.n}, activation_levels={self.coding.levels.n}"
        )

    def weight_codes(self) -> Tensor:
        """uint8 codes of the weight, `[out_features, in_features]`."""
        return packing.unpack(self.weight_packed, self.in_features, self.weight_levels.n)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, without gradient."""
        if x.shape[-1:] != (self.in_features,):
            self._refuse(x)
        if self.compiled and native.direct(x):
            return self.run_native(x, output_dtype(x))
        if self.compiled and native.takes(x):
            return torch.ops.bellbox.packed_linear(x, self._key, output_dtype(x))
        if not x.is_floating_point():
            self._refuse(x)
        return self._run_reference(x)

    def _refuse(self, x: Tensor) -> NoReturn:
        raise BellboxError(
            f"a packed layer of {self.in_features} inputs got shape {tuple(x.shape)}, dtype {x.dtype}"
        )

    @torch.no_grad()
    def _run_reference(self, x: Tensor) -> Tensor:
        purpose = ("packed", self.coding)
        state = self.act_rstd, self.act_signs
        levels, row_scales = self.shared.get_or_compute(self, x, purpose, state, self._input_integers)
        weight_scale = self.weight_scale / self.weight_levels.multiplier
        act_scale = self.act_scale / self.coding.levels.multiplier
        product = scaled_product(levels, self._weight_integers(), weight_scale, act_scale, row_scales)
        return epilogue(product, self.bias, x).reshape(*x.shape[:-1], self.out_features)

    def run_native(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The compiled kernels: rotation, codes, product and epilogue in one call, for all siblings at once."""
        shared, ready = self.shared, self.prepack()
        if shared.readers == 1 or not shared.remembers(x) or len(shared.members) != shared.readers:
            return self._native_outputs(x, ready, ready.alone, dtype)[0]
        out = shared.outputs.take(self, ready, x, dtype)
        if out is not None:
            return out
        group = [layer.prepack() for layer in shared.members]
        outs = self._native_outputs(x, ready, shared.outputs.together(group), dtype)
        results = {
            id(layer): (made_by, out) for layer, made_by, out in zip(shared.members, group, outs, strict=True)
        }
        _, out = results.pop(id(self))
        shared.outputs.put(x, dtype, results)
        return out

    def _native_outputs(
        self, x: Tensor, ready: Prepacked, layers: native.Siblings, wanted: torch.dtype
    ) -> list[Tensor]:
        x = with_signs(x, ready.signs)
        if wanted in native.TYPES:
            return layers.call(x, wanted, torch.get_num_threads())
        return [out.to(wanted) for out in layers.call(x, torch.float32, torch.get_num_threads())]

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes `[rows, in_features]` of an input, from the very path that a forward takes."""
        rows, coding = x.reshape(-1, self.in_features), self.coding
        if not (self.compiled and native.takes(x)):
            return coding.encode(rows, self.act_rstd, self.act_signs)[0]
        rows = with_signs(rows, self.act_signs)
        integers, _, _ = native.encode(rows, *self.coding_arguments())
        return ((integers - coding.levels.integers[0]) // coding.levels.multiplier).to(torch.uint8)

    def prepack(self, arena: native.Arena | None = None) -> Prepacked:
        """The weights in the machine's layout, made at the first use and again only if a buffer has changed.

        Args:
            arena: where to put them if they have to be made.
        """
        ready = self._prepacked
        if ready is None or not ready.holds(self._buffers):
            ready = self._prepacked = Prepacked(self, arena)
        return ready

    def coding_arguments(self) -> tuple[Levels, int, native.Normalise, float, bool]:
        """Those of `native.Coding` and, after the rows, of `native.encode`."""
        coding, rstd = self.coding, 0.0 if self.act_rstd is None else float(self.act_rstd)
        return coding.levels, coding.block, coding.normalise, rstd, coding.rescale

    def _input_integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, self.in_features)
        codes, row_scales = self.coding.encode(rows, self.act_rstd, self.act_signs)
        return self.coding.levels.decode_int8(codes), row_scales

    def _weight_integers(self) -> Tensor:
        """int8 `[out, in]`, unpacked at the first use and kept: the reference trades memory for simplicity."""
        if torch.compiler.is_compiling():  # a compiled graph cannot tell whether the codes have changed
            return self.weight_levels.decode_int8(self.weight_codes())
        packed, version, kept = self.weight_packed, version_of(self.weight_packed), self._integers
        if kept is None or kept[0] is not packed or kept[1] != version:
            kept = self._integers = (packed, version, self.weight_levels.decode_int8(self.weight_codes()))
        return kept[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Follow moves between devices, never a change of dtype: the scales are part of an exact function."""
        self._integers = None
        return super()._apply(keeping_dtype(fn), recurse)


def output_dtype(x: Tensor) -> torch.dtype:
    """What the caller of a layer expects for an input on the CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
_keys = itertools.count(1)


def _register(layer: PackedLinear) -> int:
    key = next(_keys)
    _layers[key] = layer
    return key


# A compiled graph cannot hold a Python object: it holds the layer's key and the operation looks it up.
_library = torch.library.Library("bellbox", "FRAGMENT")
_library.define("packed_linear(Tensor x, int key, ScalarType dtype) -> Tensor")


def packed_layer(key: int) -> PackedLinear:
    """The layer of a key that a graph holds."""
    return _layers[key]


def _packed_linear(x: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    return packed_layer(key).run_native(x, dtype)


def _packed_linear_fake(x: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed_layer(key).out_features), dtype=dtype)


_library.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake("bellbox::packed_linear", _packed_linear_fake, lib=_library)
