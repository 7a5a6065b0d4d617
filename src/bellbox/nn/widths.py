"""The width of a model whose layers have several (nested codes): which there are, and which one is used.

A width is a way to look at a trained model, as its mode is: no state dict holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from bellbox.errors import BellboxError
from bellbox.nn.coded import CodedLayer
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.tools import quantized_layers
from bellbox.quantizers.base import Quantizer


def nested_widths(model: nn.Module) -> tuple[int, ...]:
    """Bits of the widths that a prepared model can be used at, the widest first; empty where its layers have one each.

    Where layers have different lists, those that at least one of them has.
    """
    found = {
        bits for _, layer in quantized_layers(model) for each in _quantizers(layer) for bits in each.widths
    }
    return tuple(sorted(found, reverse=True))


def set_bits(model: nn.Module, bits: int | Mapping[str, int]) -> None:
    """Use a prepared model at another of its widths: weights, and the inputs that were trained so, have these bits.

    Layers that have one width only stay as they are. A layer that does not have this very width takes its widest below
    it.

    Args:
        model: what `prepare` gave for a recipe with `nested` widths.
        bits: of all layers, or by the dotted name of each layer; those that are not named stay as they are. Layers that
            share an input have one width.

    Raises:
        BellboxError: a width or a layer that the model does not have, layers with a common input at different widths,
            or a packed model, which has the width that it was converted or loaded at. Nothing was changed then.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(nested=(4, 2)))
        >>> bb.set_bits(model, 2)
        >>> model[0].weight_quantizer.levels.n
        4
    """
    layers = dict(quantized_layers(model))
    widths = nested_widths(model)
    if not widths:
        raise BellboxError(_why_no_widths(model))
    if isinstance(bits, Mapping):
        chosen = {name: _width_of(name, layers.get(name), each) for name, each in bits.items()}
    elif bits not in widths:
        raise BellboxError(f"the model has no width of {bits} bits; it has {', '.join(map(str, widths))}")
    else:
        chosen = {name: bits for name, layer in layers.items() if any(q.widths for q in _quantizers(layer))}
    wanted: dict[Quantizer, int] = {}
    for name, width in chosen.items():
        for quantizer in _quantizers(layers[name]):
            if quantizer.widths:
                at = width_at(name, quantizer.widths, width)
                if wanted.setdefault(quantizer, at) != at:
                    raise BellboxError(
                        f"layer {name!r} shares its input with one of {wanted[quantizer]} bits, so it cannot have "
                        f"{at}; give layers that read one tensor the same width"
                    )
    _refuse_divided(layers, wanted)
    for quantizer, width in wanted.items():
        quantizer.use_bits(width)
    for layer in layers.values():
        layer.forget_codes()


@contextmanager
def using_bits(model: nn.Module, bits: int | None) -> Iterator[None]:
    """Within it the model is used at a width, afterwards at those of before. None: as it is."""
    if bits is None:
        yield
        return
    before = {quantizer: quantizer.levels.n.bit_length() - 1 for quantizer in _nested(model)}
    set_bits(model, bits)
    try:
        yield
    finally:
        for quantizer, width in before.items():
            quantizer.use_bits(width)
        for _, layer in quantized_layers(model):
            layer.forget_codes()


def _nested(model: nn.Module) -> list[Quantizer]:
    """Each quantizer with several widths, once."""
    found = [each for _, layer in quantized_layers(model) for each in _quantizers(layer) if each.widths]
    return list(dict.fromkeys(found))


def _quantizers(layer: QuantizedLayer) -> list[Quantizer]:
    inputs = layer.activation_quantizer
    both = layer.weight_quantizer, None if inputs is None else inputs.quantizer
    return [each for each in both if each is not None]


def width_at(name: str, widths: Sequence[int], bits: int) -> int:
    """The widest of a layer's widths that is no wider than `bits`.

    Raises:
        BellboxError: it has none.
    """
    found = next((each for each in widths if each <= bits), None)
    if found is None:
        raise BellboxError(
            f"layer {name!r} has no width of {bits} bits or fewer; it has {', '.join(map(str, widths))}"
        )
    return found


def _width_of(name: str, layer: QuantizedLayer | None, bits: int) -> int:
    """What was asked of one layer, once it is found to have it."""
    widths = () if layer is None or layer.weight_quantizer is None else layer.weight_quantizer.widths
    if not widths:
        raise BellboxError(f"the model has no layer {name!r} of several widths")
    if bits not in widths:
        raise BellboxError(
            f"layer {name!r} has no width of {bits} bits; it has {', '.join(map(str, widths))}"
        )
    return bits


def _refuse_divided(layers: Mapping[str, QuantizedLayer], wanted: Mapping[Quantizer, int]) -> None:
    """Layers whose weight keeps its width while the input that they share gets another one."""
    for name, layer in layers.items():
        weight, inputs = layer.weight_quantizer, layer.activation_quantizer
        if weight is None or inputs is None or not (weight.widths and inputs.quantizer.widths):
            continue
        there = [wanted.get(each, each.levels.n.bit_length() - 1) for each in (weight, inputs.quantizer)]
        if there[0] != there[1]:
            raise BellboxError(
                f"layer {name!r} shares an input that would have {there[1]} bits, and would itself have {there[0]}; "
                "give layers that read one tensor the same width"
            )


def _why_no_widths(model: nn.Module) -> str:
    if any(isinstance(module, CodedLayer) for module in model.modules()):
        return (
            "a packed model has the width that it was packed or loaded at: bb.load(folder, bits=2), or set_bits before "
            "convert"
        )
    return "the model has one width; train one with several: bb.Recipe.bbq(nested=(4, 3, 2, 1))"
