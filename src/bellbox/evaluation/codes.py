"""The codes of low-bit layers, trained or packed: how they are used, and whether two models have the same ones.

`agreement` is the proof behind `bellbox convert`: the packed model is run beside the trained one on real text,
and every weight code, every code of every layer's input and every logit is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.entropy import code_counts, entropy_bits
from bellbox.errors import BellboxError
from bellbox.nn import CodedLayer, PackedLayer, QuantizedLayer
from bellbox.nn.compact import Compact
from bellbox.nn.quantized_experts import LAYERS
from bellbox.nn.quantized_table import QuantizedTable, table_input_codes

LowBitLayer = QuantizedLayer | CodedLayer
RoundedTable = QuantizedTable | Compact


def low_bit_layers(model: nn.Module) -> dict[str, LowBitLayer]:
    """Every fake-quantized or packed layer by its dotted name; of fused experts by the one that it has when packed."""
    found = ((name.replace(f".{LAYERS}.", "."), module) for name, module in model.named_modules())
    return {name: module for name, module in found if isinstance(module, QuantizedLayer | CodedLayer)}


def rounded_tables(model: nn.Module) -> dict[str, RoundedTable]:
    """Every embedding and head of integers by its dotted name, in training form or packed."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, RoundedTable))
    return {name: m for name, m in found if m.coding is not None}


@dataclass(frozen=True)
class CodeUse:
    """How evenly codes are used; entropies in bits per code, by layer."""

    weight: dict[str, float]
    """Of each layer's weight codes."""
    weight_limit: dict[str, float]
    """log2 of the number of levels: the most that `weight` can be."""
    activation: dict[str, float]
    """Of each layer's input codes; layers that share an input appear under the first."""
    activation_limit: dict[str, float]
    """Likewise for `activation`."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: mean, min, limit and layers of both."""
        return {
            "weight_entropy": _spread(self.weight, self.weight_limit),
            "activation_entropy": _spread(self.activation, self.activation_limit),
        }


def _spread(entropy: dict[str, float], limit: dict[str, float]) -> dict[str, Any] | None:
    if not entropy:
        return None
    mean = sum(entropy.values()) / len(entropy)
    return {"mean": mean, "min": min(entropy.values()), "limit": max(limit.values()), "layers": entropy}


@torch.no_grad()
def code_use(model: nn.Module, tokens: Tensor) -> CodeUse | None:
    """Entropy of weight codes and of input codes; None where no layer is low-bit.

    Args:
        model: in evaluation mode.
        tokens: int64 `[batch, T]`, or images, whose activations are counted.
    """
    layers = low_bit_layers(model)
    if not layers:
        return None
    weights = {
        name: code_counts(layer.weight_codes(), n)
        for name, layer in layers.items()
        if (n := _weight_n(layer))
    }
    inputs: dict[str, Tensor] = {}

    def count(name: str, codes: Tensor, n: int) -> None:
        inputs[name] = inputs.get(name, 0) + code_counts(codes, n)

    with _input_codes({name: layers[name] for name in _input_owners(layers)}, count):
        model(tokens)
    return CodeUse(
        weight={name: entropy_bits(counts) for name, counts in weights.items()},
        weight_limit={name: _bits(counts) for name, counts in weights.items()},
        activation={name: entropy_bits(counts) for name, counts in inputs.items()},
        activation_limit={name: _bits(counts) for name, counts in inputs.items()},
    )


@dataclass(frozen=True)
class Agreement:
    """How far two models are the same function, on some text."""

    layers: int
    """Layers compared: all low-bit ones."""
    tokens: int
    """Tokens, or images, that both models were run on."""
    weight_codes: int
    """Weight codes compared, those of rounded embeddings and heads too."""
    input_codes: int
    """Input codes compared, of every layer and rounded head for every token or image."""
    mismatches: int
    """Codes that differ."""
    logits: int
    """Logits compared."""
    logit_difference: float
    """Largest difference of two logits over the largest magnitude of a logit; 0.0 where all are equal bits."""

    @property
    def codes(self) -> int:
        """Codes compared, of weights and of inputs."""
        return self.weight_codes + self.input_codes

    @property
    def holds(self) -> bool:
        """Whether all codes are equal and logits agree to 1e-5 relative."""
        return self.mismatches == 0 and self.logit_difference <= 1e-5


@torch.no_grad()
def agreement(trained: nn.Module, packed: nn.Module, batches: Iterable[Tensor]) -> Agreement:
    """Run both models on the same tokens and compare everything.

    Args:
        trained: with fake-quantized layers, in evaluation mode.
        packed: its packed form, likewise.
        batches: int64 `[batch, T]` each, or images `[batch, channels, height, width]`.

    Raises:
        BellboxError: they do not have the same low-bit layers.
    """
    left, right = low_bit_layers(trained), low_bit_layers(packed)
    if not left or list(left) != list(right):
        raise BellboxError(f"the models cannot be compared: {len(left)} and {len(right)} low-bit layers")
    tables, others = rounded_tables(trained), rounded_tables(packed)
    if list(tables) != list(others):
        raise BellboxError(
            f"the models cannot be compared: {len(tables)} and {len(others)} rounded embeddings"
        )
    compared, differing = {"weight": 0, "input": 0}, 0
    for name, table in tables.items():
        for one, other in zip(table.codes()[:2], others[name].codes()[:2], strict=True):
            compared["weight"] += 0 if one is None else one.numel()
            differing += 0 if one is None else _differing(one, other)
    for name, layer in left.items():
        one, other = layer.weight_codes(), right[name].weight_codes()
        compared["weight"] += one.numel()
        differing += _differing(one, other)
    tokens = logits = 0
    worst = largest = 0.0
    for batch in batches:
        kept: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        with _input_codes({**left, **tables}, lambda name, codes, _, to=kept: to.update({name: codes})):
            expected = trained(batch)
        with _input_codes({**right, **others}, lambda name, codes, _, to=found: to.update({name: codes})):
            got = packed(batch)
        compared["input"] += sum(codes.numel() for codes in kept.values())
        differing += sum(_differing(codes, found.get(name)) for name, codes in kept.items())
        size = len(batch) if batch.is_floating_point() else batch.numel()
        tokens, logits = tokens + size, logits + expected.numel()
        worst = max(worst, float((expected - got).abs().max().nan_to_num(torch.inf)))
        largest = max(largest, float(expected.abs().max()))
    difference = worst / largest if largest else worst
    return Agreement(len(left), tokens, compared["weight"], compared["input"], differing, logits, difference)


def _differing(one: Tensor, other: Tensor | None) -> int:
    if other is None or other.numel() != one.numel():
        return one.numel()
    return int((one.reshape(-1) != other.reshape(-1)).sum())


@contextmanager
def _input_codes(
    layers: Mapping[str, LowBitLayer | RoundedTable], receive: Callable[[str, Tensor, int], object]
) -> Iterator[None]:
    """While open, each forward of a layer hands (name, codes of its input, number of levels) to `receive`."""

    def hook(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(layer, PackedLayer):
            receive(name, layer.input_codes(x), layer.coding.levels.n)
        elif isinstance(layer, QuantizedLayer) and layer.activation_quantizer is not None:
            quantizer = layer.activation_quantizer.quantizer
            receive(name, layer.input_codes(x), quantizer.levels.n)
        elif isinstance(layer, RoundedTable) and layer.coding is not None and x.is_floating_point():  # a head
            receive(name, table_input_codes(x, layer.coding), 0)

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_owners(layers: dict[str, LowBitLayer]) -> list[str]:
    """The first name of each group of layers that share an input."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLayer):
            shared = layer.activation_quantizer
        else:
            shared = layer.group if isinstance(layer, PackedLayer) else None
        if shared is not None:
            first.setdefault(id(shared), name)
    return list(first.values())


def _weight_n(layer: LowBitLayer) -> int | None:
    if isinstance(layer, CodedLayer):
        return layer.weight_levels.n
    return None if layer.weight_quantizer is None else layer.weight_quantizer.levels.n


def _bits(counts: Tensor) -> float:
    return torch.log2(torch.tensor(float(len(counts)), dtype=torch.float64)).item()
