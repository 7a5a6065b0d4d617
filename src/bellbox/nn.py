"""The layers that `prepare` and `convert` put in place of `nn.Linear`.

`QuantizedLinear` is for training: it keeps the full-precision weight and quantizes it, and its input, in every
forward. `PackedLinear` is for inference: it holds codes only. In evaluation both compute the same integers and
the same epilogue, so converting changes no bit of the result.

Layers that read the very same tensor (q, k, v; gate, up) can share one activation quantizer. `SharedInput`
remembers what it made of a tensor until every sibling has asked for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox import packing
from bellbox.entropy import code_counts
from bellbox.errors import BellboxError
from bellbox.kernels import native
from bellbox.kernels.encode import compute_dtype, encode, mark, normaliser, row_sigma, static_normaliser
from bellbox.kernels.integer import scaled_product
from bellbox.levels import Levels
from bellbox.quantizers.base import Quantizer


def version_of(tensor: Tensor | None) -> int:
    """Counts changes in place; -1 where nobody counts them (tensors made in inference mode)."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


class SharedInput:
    """What sibling layers make of their common input, computed once.

    Recognises the input by identity and version, and the quantizer's own numbers by their versions, so that nothing
    changed or different is ever served from memory. Each reader is served once: one that asks again (a second step on
    the same tensor) gets a fresh result, and the last one empties the memory. Where identity cannot be told
    (inside `torch.compile`, in inference mode), it computes each time; a compiler merges the repetition by itself.
    """

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        self.members: list[PackedLinear] = []
        """Packed siblings: one call of the native kernels serves them all."""
        self._memory: tuple[Any, ...] | None = None

    def remembers(self, x: Tensor) -> bool:
        """Whether `once` can recognise `x` when the next sibling comes with it."""
        return self.readers > 1 and not torch.compiler.is_compiling() and not x.is_inference()

    def once(
        self,
        reader: object,
        x: Tensor,
        purpose: tuple[Any, ...],
        state: Sequence[Tensor | None],
        compute: Callable[[Tensor], Any],
    ) -> Any:
        """`compute(x)`, or what it gave to a sibling just before.

        Args:
            reader: who asks.
            x: the input.
            purpose: what is computed, beyond `x`.
            state: further tensors that the result depends on, or that computing it changes.
            compute: the work.
        """
        if not self.remembers(x):
            return compute(x)
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (purpose, x.requires_grad, torch.is_grad_enabled(), autocast)
        versions = [version_of(tensor) for tensor in (x, *state)]
        memory = self._memory  # read once: another thread may replace it
        if memory is not None and memory[0] is x and memory[1:3] == (key, versions):
            _, _, _, result, served = memory
            if id(reader) not in served:
                served = served | {id(reader)}
                self._memory = None if len(served) == self.readers else (x, key, versions, result, served)
                return result
        result = compute(x)
        versions = [version_of(tensor) for tensor in (x, *state)]  # computing may have set a scale
        self._memory = (x, key, versions, result, frozenset({id(reader)}))
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without memory (it may hold tensors of a running graph)."""
        return {**self.__dict__, "_memory": None}


class ActivationQuantizer(nn.Module):
    """An activation quantizer with its siblings' memory and its observers."""

    def __init__(self, quantizer: Quantizer, readers: int = 1) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.shared = SharedInput(readers)
        self.observers: list[Callable[[Tensor], None]] = []

    @property
    def levels(self) -> Levels:
        """The integers that the quantizer uses."""
        return self.quantizer.levels

    @property
    def gamma(self) -> Tensor | None:
        """The learned scale, where the method has one."""
        return getattr(self.quantizer, "gamma", None)

    def forward(self, x: Tensor, reader: object = None) -> Tensor:
        """Fake-quantize `[..., features]` for a layer, differentiable."""
        return self.shared.once(reader, x, ("fake", self.training), self._state(), self._fake)

    def integers(self, x: Tensor, reader: object = None) -> tuple[Tensor, Tensor]:
        """int8 integer levels `[rows, features]` and fp32 marks `[rows, 1]` of `[..., features]`, for a layer."""
        return self.shared.once(reader, x, ("integers",), self._state(), self._integers)

    def _state(self) -> list[Tensor | None]:
        return [*self.quantizer._parameters.values(), *self.quantizer._buffers.values()]

    def _fake(self, x: Tensor) -> Tensor:
        if self.observers:
            self._observe(self.quantizer.codes(x))
        return self.quantizer(x)

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, mark = self.quantizer.encode(x)
        self._observe(codes)
        return self.levels.decode_int8(codes).reshape(-1, x.shape[-1]), mark.reshape(-1, 1)

    def _observe(self, codes: Tensor) -> None:
        for observer in self.observers:
            observer(codes)


class QuantizedLinear(nn.Module):
    """`nn.Linear` whose weight and input are fake-quantized.

    Args:
        linear: the layer to take weight and bias from (shared with it, not copied).
        weight_quantizer: quantizer of the weight, or None to leave it.
        activation_quantizer: of the input, or None to leave it. One that another layer owns is passed with
            `owned=False`, and then appears in the state dict under its owner only.
        owned: whether this layer registers the activation quantizer.
    """

    activation_quantizer: ActivationQuantizer | None
    weight_quantizer: Quantizer | None

    def __init__(
        self,
        linear: nn.Linear,
        weight_quantizer: Quantizer | None,
        activation_quantizer: ActivationQuantizer | None,
        owned: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_quantizer = weight_quantizer
        if owned:
            self.activation_quantizer = activation_quantizer
        else:
            # Past nn.Module's own bookkeeping: a borrowed quantizer must not be registered twice.
            object.__setattr__(self, "activation_quantizer", activation_quantizer)
        self._cached: tuple[Tensor, int, Tensor, Tensor] | None = None
        if weight_quantizer is not None and activation_quantizer is not None:
            blocks = weight_quantizer.block, activation_quantizer.quantizer.block
            if blocks[0] != blocks[1]:
                raise BellboxError(f"weight and activation must be rotated alike, not by blocks {blocks}")
        elif (weight_quantizer or (activation_quantizer and activation_quantizer.quantizer)) is not None:
            self._require_unrotated()

    def _require_unrotated(self) -> None:
        for quantizer in (
            self.weight_quantizer,
            self.activation_quantizer and self.activation_quantizer.quantizer,
        ):
            if quantizer is not None and quantizer.block != 1:
                raise BellboxError(
                    "quantizing only weights or only activations needs block=1: a rotation must cancel"
                )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    @property
    def runs_on_integers(self) -> bool:
        """Whether evaluation multiplies integers: both sides quantized to levels that fit int8."""
        pair = self.weight_quantizer, self.activation_quantizer
        return all(q is not None and q.levels.fits_int8 for q in pair)

    def weight_codes(self) -> Tensor:
        """uint8 codes of the weight, `[out_features, in_features]`, in the rotated domain.

        Raises:
            BellboxError: the weight is not quantized, or holds NaN or infinity.
        """
        if self.weight_quantizer is None:
            raise BellboxError("the weight of this layer is not quantized")
        codes, mark = self.weight_quantizer.encode(self.weight)
        if bool(mark.isnan().any()):
            raise BellboxError(
                f"the weight of {self.weight_quantizer.name or 'a layer'} holds NaN or infinity"
            )
        return codes

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.training or not self.runs_on_integers:
            return self._dequantized(x)
        exact = self._integer(x)
        if not torch.is_grad_enabled():
            return exact
        # Values of the integer path, gradient of the other: lin - lin is exactly zero.
        smooth = self._dequantized(x)
        return exact.detach() + (smooth - smooth.detach())

    def _dequantized(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        x = x if self.activation_quantizer is None else self.activation_quantizer(x, self)
        return F.linear(x, weight, self.bias)

    def _integer(self, x: Tensor) -> Tensor:
        assert self.activation_quantizer is not None
        weight, weight_scale = self._integer_weight()
        levels, mark = self.activation_quantizer.integers(x, self)
        act_scale = integer_scale(self.activation_quantizer.quantizer).reshape(())
        return finish(scaled_product(levels, weight, weight_scale, act_scale, mark), self.bias, x)

    @torch.no_grad()
    def _integer_weight(self) -> tuple[Tensor, Tensor]:
        """int8 weight and its scale, made anew only when the parameter has changed (a compiled graph cannot tell)."""
        assert self.weight_quantizer is not None
        if torch.compiler.is_compiling():
            integers, mark = self._encoded_weight()
        else:
            version, cached = version_of(self.weight), self._cached
            if cached is None or cached[0] is not self.weight or cached[1] != version:
                cached = self._cached = (self.weight, version, *self._encoded_weight())
            _, _, integers, mark = cached
        return integers, integer_scale(self.weight_quantizer).reshape(-1) * mark

    def _encoded_weight(self) -> tuple[Tensor, Tensor]:
        assert self.weight_quantizer is not None
        codes, mark = self.weight_quantizer.encode(self.weight)
        return self.weight_quantizer.levels.decode_int8(codes), mark.reshape(-1)

    def train(self, mode: bool = True) -> QuantizedLinear:
        """Training needs no integer copy of the weight: drop it."""
        if mode:
            self._cached = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self._cached = None
        return super()._apply(fn, recurse)


def integer_scale(quantizer: Quantizer) -> Tensor:
    """What one *integer* is worth, fp32: the scale of a level, halved (exactly) where integers are doubled."""
    return quantizer.scale() / quantizer.levels.multiplier


def finish(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Add the bias and give `[rows, out]` the leading shape of `x` and the dtype its caller expects."""
    if bias is not None:
        product = product + bias.to(torch.float32)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return product.to(dtype).reshape(*x.shape[:-1], product.shape[-1])


@dataclass(frozen=True)
class InputCoding:
    """How a packed layer codes its input: everything but the numbers that lie in its buffers."""

    levels: Levels
    block: int
    statistic: Literal["token", "ema"]

    def encode(self, rows: Tensor, rsigma: Tensor | None) -> tuple[Tensor, Tensor]:
        """uint8 codes `[rows, features]` and fp32 marks `[rows, 1]` of float rows."""
        if self.statistic == "ema":
            assert rsigma is not None
            r = static_normaliser(rsigma, rows, self.block)
        else:
            r = normaliser(row_sigma(rows), self.block)
        r = r.to(compute_dtype(rows))
        return encode(rows, r, self.levels.thresholds, self.block), mark(r, len(rows))


@dataclass(frozen=True)
class Prepacked:
    """What the compiled kernels need of a packed layer."""

    version: list[tuple[int, int] | None]
    """Of the buffers that it was made from."""
    weights: native.Weights
    act_scale: float
    """What one integer of the input is worth."""
    coding: native.Coding


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
    and `act_scale` fp32 `[]` (what one level is worth), `act_rsigma` fp32 `[]` (`ema` only), `bias` fp32 `[out]`.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    act_scale: Tensor
    act_rsigma: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_levels: Levels,
        coding: InputCoding,
        bias: bool,
        shared: SharedInput | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_levels, self.coding = weight_levels, coding
        self.shared = shared or SharedInput()
        self.shared.members.append(self)
        size = packing.row_bytes(in_features, weight_levels.n)
        self.register_buffer("weight_packed", torch.zeros(out_features, size, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(out_features))
        self.register_buffer("act_scale", torch.zeros(()))
        self.register_buffer("act_rsigma", torch.zeros(()) if coding.statistic == "ema" else None)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._integers: tuple[Tensor, int, Tensor] | None = None
        self._prepacked: Prepacked | None = None
        self._key = _register(self)
        # Asked here, once: a compiler that traces the forward cannot look for a module.
        self._compiled = native.can_multiply(weight_levels, coding.levels)

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its own weights."""
        return {**self.__dict__, "_prepacked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has its own key."""
        super().__setstate__(state)
        self._key = _register(self)

    @classmethod
    def from_quantized(cls, layer: QuantizedLinear, shared: SharedInput | None = None) -> PackedLinear:
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
        codes = layer.weight_codes()
        statistic = activation.quantizer.statistic
        assert statistic in ("token", "ema")
        coding = InputCoding(activation.levels, activation.quantizer.block, statistic)
        bias = layer.bias
        packed = cls(layer.in_features, layer.out_features, weight.levels, coding, bias is not None, shared)
        packed.to(layer.weight.device)
        packed.weight_packed.copy_(packing.pack(codes, weight.levels.n))
        packed.weight_scale.copy_(weight.scale().reshape(-1).expand(layer.out_features))
        packed.act_scale.copy_(activation.quantizer.scale().reshape(()))
        if packed.act_rsigma is not None:
            packed.act_rsigma.copy_(activation.quantizer.get_buffer("r_ema"))
        if bias is not None and packed.bias is not None:
            packed.bias.copy_(bias.detach())
        return packed.train(layer.training)

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
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise BellboxError(
                f"a packed layer of {self.in_features} inputs got shape {tuple(x.shape)}, dtype {x.dtype}"
            )
        if self._compiled and native.takes(x):
            tracing = torch.compiler.is_compiling()
            return torch.ops.bellbox.packed_linear(x, self._key) if tracing else self.run_native(x)
        return self._run_reference(x)

    @torch.no_grad()
    def _run_reference(self, x: Tensor) -> Tensor:
        purpose = ("packed", self.coding)
        levels, marks = self.shared.once(self, x, purpose, (self.act_rsigma,), self._input_integers)
        weight_scale = self.weight_scale / self.weight_levels.multiplier
        act_scale = self.act_scale / self.coding.levels.multiplier
        product = scaled_product(levels, self._weight_integers(), weight_scale, act_scale, marks)
        return finish(product, self.bias, x)

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the caller of a linear layer expects for an input `x`."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def run_native(self, x: Tensor) -> Tensor:
        """The compiled kernels: rotation, codes, product and epilogue in one call, for all siblings at once."""
        members = self.shared.members
        if len(members) != self.shared.readers or not self.shared.remembers(x):
            return self._native_outputs(x, [self])[0]
        state = [buffer for member in members for buffer in member._buffers.values()]
        outputs = self.shared.once(self, x, ("native",), state, lambda x: self._native_outputs(x, members))
        return outputs[next(i for i, member in enumerate(members) if member is self)]

    def _native_outputs(self, x: Tensor, layers: list[PackedLinear]) -> list[Tensor]:
        ready = [layer.prepack() for layer in layers]
        wanted = self.output_dtype(x)
        dtype = wanted if wanted in (torch.float32, torch.bfloat16) else torch.float32
        weights, scales = [each.weights for each in ready], [each.act_scale for each in ready]
        outs = native.linear(x, weights, scales, ready[0].coding, dtype)
        return outs if dtype == wanted else [out.to(wanted) for out in outs]

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """uint8 codes `[rows, in_features]` of an input, from the very path that a forward takes."""
        rows, coding = x.reshape(-1, self.in_features), self.coding
        if not (self._compiled and native.takes(x)):
            return coding.encode(rows, self.act_rsigma)[0]
        integers, _, _ = native.encode(rows, coding.levels, coding.block, self._fixed_rsigma())
        return ((integers - coding.levels.integers[0]) // coding.levels.multiplier).to(torch.uint8)

    def prepack(self) -> Prepacked:
        """The weights in the machine's layout, made at the first use and again only if a buffer has changed."""
        version = [None if b is None else (id(b), version_of(b)) for b in self._buffers.values()]
        if self._prepacked is None or self._prepacked.version != version:
            scale = self.weight_scale / self.weight_levels.multiplier
            self._prepacked = Prepacked(
                version,
                native.Weights(self.weight_codes(), self.weight_levels, scale, self.bias),
                float(self.act_scale / self.coding.levels.multiplier),
                native.Coding(self.coding.levels, self.coding.block, self._fixed_rsigma()),
            )
        return self._prepacked

    def _fixed_rsigma(self) -> float:
        return 0.0 if self.act_rsigma is None else float(self.act_rsigma)

    def _input_integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, marks = self.coding.encode(x.reshape(-1, self.in_features), self.act_rsigma)
        return self.coding.levels.decode_int8(codes), marks

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

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
_keys = itertools.count(1)


def _register(layer: PackedLinear) -> int:
    key = next(_keys)
    _layers[key] = layer
    return key


# A compiled graph cannot hold a Python object: it holds the layer's key and the operation looks it up.
_library = torch.library.Library("bellbox", "FRAGMENT")
_library.define("packed_linear(Tensor x, int key) -> Tensor")


def _packed_linear(x: Tensor, key: int) -> Tensor:
    return _layers[key].run_native(x)


def _packed_linear_fake(x: Tensor, key: int) -> Tensor:
    layer = _layers[key]
    return x.new_empty((*x.shape[:-1], layer.out_features), dtype=layer.output_dtype(x))


_library.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake("bellbox::packed_linear", _packed_linear_fake, lib=_library)


def without_fused_paths(model: nn.Module) -> None:
    """Have torch's own transformer layers call their linear layers.

    In evaluation they may read the weights past the layers' forward, which would use float weights where there
    are quantized ones; these attributes, checked by torch before it does, switch that off.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def replace_layer(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` in every place of `root` where `old` stands (a layer may be used under several names).

    Returns:
        `root`, or `new` where `root` is the layer itself.
    """
    for parent in list(root.modules()):
        for leaf, child in parent._modules.items():
            if child is old:
                setattr(parent, leaf, new)
    return new if root is old else root


def _add_counts(total: Tensor, codes: Tensor) -> None:
    total += code_counts(codes, len(total))


@contextmanager
def record_activation_codes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count the activation codes of every quantized layer while the context is open.

    Yields:
        layer name -> int64 `[n]`, filled by each forward. Siblings that share a quantizer appear under its owner.
    """
    counts: dict[str, Tensor] = {}
    attached: list[tuple[ActivationQuantizer, Callable[[Tensor], None]]] = []
    for name, layer in quantized_layers(model):
        quantizer = layer._modules.get("activation_quantizer")
        if isinstance(quantizer, ActivationQuantizer):
            counts[name] = torch.zeros(quantizer.levels.n, dtype=torch.int64, device=layer.weight.device)

            observe = partial(_add_counts, counts[name])
            quantizer.observers.append(observe)
            attached.append((quantizer, observe))
    try:
        yield counts
    finally:
        for quantizer, observe in attached:
            quantizer.observers.remove(observe)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Every `QuantizedLinear` with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module
