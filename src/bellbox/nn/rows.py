"""Packed layers with the rows of others: q, k and v as one layer, or one layer as q, k and v.

A row of weights and its scale stand alone; what codes the input is common. So both ways are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bellbox.nn.coded import CodedLayer
from bellbox.nn.packed_linear import PackedLinear
from bellbox.nn.transposed import PackedTransposed
from bellbox.nn.weight_only import WeightOnlyLinear


def joined(layers: Sequence[Any]) -> CodedLayer:
    """One layer with the rows of several that code their input, and their weights, alike."""
    bias = None if layers[0].bias is None else torch.cat([each.bias for each in layers])
    rows, scales = (
        torch.cat([getattr(each, name) for each in layers]) for name in ("weight_packed", "weight_scale")
    )
    return _with_rows(layers[0], rows, scales, bias)


def why_apart(one: Any, other: Any) -> str | None:
    """What keeps two layers from being one (`joined`); None where nothing does."""
    if type(one) is not type(other):
        return "they are of two kinds"
    if one.weight_levels != other.weight_levels:
        return "their weights have other levels"
    if (one.bias is None) != (other.bias is None):
        return "not all have a bias"
    settings = ("coding",) if isinstance(one, PackedLinear) else ("scale_group", "block")
    if any(getattr(one, name) != getattr(other, name) for name in settings):
        return "they code their input differently"
    for name in ("act_scale", "act_thresholds", "act_rstd", "act_signs", "weight_table"):
        a, b = one._buffers.get(name), other._buffers.get(name)
        if a is not b and (a is None or b is None or not torch.equal(a, b)):
            return f"they differ in {name}"
    return None


def split(layer: Any, sizes: list[int]) -> list[CodedLayer]:
    """Layers of so many rows each, out of one; they share their input."""
    rows, scales = layer.weight_packed.split(sizes), layer.weight_scale.split(sizes)
    biases = [None] * len(sizes) if layer.bias is None else layer.bias.split(sizes)
    return [_with_rows(layer, *each) for each in zip(rows, scales, biases, strict=True)]


def _with_rows(like: Any, rows: Tensor, scales: Tensor, bias: Tensor | None) -> CodedLayer:
    """A layer with other rows of weights and all else of `like`."""
    count, levels = len(rows), like.weight_levels
    if isinstance(like, PackedLinear | PackedTransposed):
        made: Any = PackedLinear(like.row_length, count, levels, like.coding, bias is not None)
        made.group = like.group
    else:
        made = WeightOnlyLinear(
            like.row_length,
            count,
            levels,
            bias is not None,
            group=like.scale_group,
            table=like.weight_table is not None,
            block=like.block,
            signs=like.act_signs is not None,
        )
    for name, value in like._buffers.items():
        if name not in ("packed", "weight_scale", "bias"):
            made._buffers[name] = value
    made._buffers["weight_scale"] = scales.contiguous()
    made._buffers["bias"] = None if bias is None else bias.contiguous()
    made.fill_from_rows(rows.contiguous())
    made.quantization_method = like.quantization_method
    return made
