"""Where the time of a forward goes: products, quantization, element-wise operations, the rest; on any device.

A packed layer is one call, so its parts are told apart by size. Layers that share an input are timed together, with all
of their outputs and once more with the first 16 of each. Coding the input costs the same in both, and what grows with
the outputs is the product; packed convolutions likewise, but for those in groups, which count as products whole.
Products and element-wise operations of torch are timed one by one as they pass; the rest is
what is left of the whole forward: attention, embeddings, copies, Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bellbox.nn import PackedLinear
from bellbox.nn.input_cache import PackedGroup
from bellbox.nn.packed_conv import PackedConv
from bellbox.ops.weight_layout import prepack

_Packed = PackedLinear | PackedConv
CLASSES = ("product", "quantization", "element-wise", "rest")
_FEW = 16
_PRODUCTS = {
    "mm", "addmm", "linear", "_int_mm", "int8_linear", "int4_linear", "float_linear", "convolution",
    "mkldnn_convolution", "mkldnn_linear",
}  # fmt: skip
_ELEMENTWISE = {
    "add", "add_", "sub", "mul", "mul_", "div", "neg", "silu", "silu_", "gelu", "relu", "relu_", "sigmoid", "pow",
    "rsqrt", "mean", "exp", "native_layer_norm", "rms_norm", "_fused_rms_norm", "layer_norm", "sqrt", "square", "sum",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "hardtanh", "hardtanh_", "clamp", "tanh", "where",
    "addcmul", "div_",
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Seconds of one forward by class; together they are the whole."""

    name: str
    product: float
    quantization: float
    elementwise: float
    rest: float

    @property
    def seconds(self) -> tuple[float, ...]:
        """In the order of `CLASSES`."""
        return self.product, self.quantization, self.elementwise, self.rest

    @property
    def total(self) -> float:
        """Of the forward."""
        return sum(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"name": self.name, "total": self.total, **dict(zip(CLASSES, self.seconds, strict=True))}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(call: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> float:
    call()
    _wait(device)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < deadline:
        begun = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


class _Clock(TorchDispatchMode):
    """Seconds of torch's operations by class, each waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.seconds = device, {"product": 0.0, "element-wise": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        kind = "product" if name in _PRODUCTS else "element-wise" if name in _ELEMENTWISE else None
        if kind is None:
            return func(*args, **(kwargs or {}))
        _wait(self.device)
        begun = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        _wait(self.device)
        self.seconds[kind] += time.perf_counter() - begun
        return out


@contextmanager
def _inputs(model: nn.Module) -> Iterator[dict[int, tuple[list[_Packed], Tensor]]]:
    """Packed layers by the tensor that they read, each once; the dictionary is filled by a forward."""
    found: dict[int, tuple[list[_Packed], Tensor]] = {}

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, _Packed)
        found.setdefault(id(given[0]), ([], given[0]))[0].append(
            layer
        )  # the tensor stays alive, so does its id

    hooks = [each.register_forward_pre_hook(note) for each in model.modules() if isinstance(each, _Packed)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _first_outputs(layers: list[_Packed]) -> list[_Packed]:
    """The layers with their first outputs alone, sharing an input as they do."""
    group, made = PackedGroup(), list[_Packed]()
    for layer in layers:
        few = min(_FEW, layer.row_count)
        grid, coding, bias = layer.weight_levels, layer.coding, layer.bias is not None
        if isinstance(layer, PackedConv):
            small = type(layer)(layer.in_channels, few, layer.geometry, grid, coding, bias)
        else:
            small = PackedLinear(layer.row_length, few, grid, coding, bias=bias)
        small = small.to(layer.packed.device).eval()
        small.packed = prepack(layer.weight_codes()[:few], grid.n, layer.places)
        for name in ("weight_scale", "bias"):
            given = getattr(layer, name)
            if given is not None:
                setattr(small, name, given[:few].clone())
        for name in ("act_scale", "act_thresholds", "act_rstd", "act_signs"):
            setattr(small, name, getattr(layer, name))
        if (
            isinstance(layer, PackedLinear)
            and isinstance(small, PackedLinear)
            and len(layer.group.layers) > 1
        ):
            small.group = group
            group.layers.append(small)
        made.append(small)
    return made


def _split(layers: list[_Packed], x: Tensor, seconds: float) -> tuple[float, float]:
    """Seconds of product and coding of layers that read one tensor."""

    def run(each: list[_Packed]) -> Callable[[], None]:
        def call() -> None:
            for layer in each:
                layer(x)

        return call

    whole = _median(run(layers), x.device, seconds)
    if any(isinstance(each, PackedConv) and each.geometry.groups > 1 for each in layers):
        return whole, 0.0  # no output has the input of all: none alone would code all of it
    small = _first_outputs(layers)
    least = min(whole, _median(run(small), x.device, seconds))
    share = sum(each.row_count for each in small) / sum(each.row_count for each in layers)
    product = (whole - least) / (1 - share) if share < 1 else 0.0
    product = min(product, whole)
    return product, whole - product


@torch.no_grad()
def profile(name: str, model: nn.Module, given: Tensor, seconds: float = 2.0) -> Profile:
    """Split a forward into classes.

    Args:
        name: of the model, for people.
        model: in evaluation; packed, or of floats.
        given: what it is called with, on its device: tokens `[batch, length]` int64, or images.
        seconds: of measuring each part, at least.
    """
    device = given.device
    with _inputs(model) as shared:
        model(given)
    kinds: dict[tuple[Any, ...], list[tuple[list[_Packed], Tensor]]] = {}
    for layers, x in shared.values():
        alike_layers = tuple(
            (each.row_count, each.row_length, each.weight_levels, getattr(each, "geometry", None))
            for each in layers
        )
        key = alike_layers, x.shape
        kinds.setdefault(key, []).append((layers, x))
    product = quantization = 0.0
    for alike in kinds.values():
        one, coding = _split(*alike[0], seconds / max(1, 2 * len(kinds)))
        product, quantization = product + one * len(alike), quantization + coding * len(alike)
    kinds.clear()
    shared.clear()
    whole = _median(lambda: model(given), device, seconds)
    clocks = []
    for _ in range(3):
        with _Clock(device) as clock:
            model(given)
        clocks.append(clock.seconds)
    product += statistics.median(each["product"] for each in clocks)
    elementwise = statistics.median(each["element-wise"] for each in clocks)
    parts = product + quantization + elementwise
    if parts > whole:  # parts that are waited for one by one come to a little more than the whole
        product, quantization, elementwise = (
            each * whole / parts for each in (product, quantization, elementwise)
        )
        parts = whole
    return Profile(name, product, quantization, elementwise, whole - parts)
