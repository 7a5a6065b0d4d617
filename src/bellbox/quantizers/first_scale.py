"""Scales from the first batch of a model that is compiled before it: an operation that changes none of its arguments.

An operation that wrote into a scale would let the compiler give the scale's gradient the same memory. This one
returns the scales instead, and the graph copies them: new ones, or those that are set already.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation
from bellbox.quantizers.registry import METHODS
from bellbox.quantizers.spec import QuantizerSpec


def _first_scale(
    x: Tensor, scales: list[Tensor], spec: str, features: int, rows: int, name: str, training: bool
) -> list[Tensor]:
    """The scales of a quantizer after a tensor has come.

    Args:
        x: `[n, features]`.
        scales: the quantizer's numbers; those that are not set are NaN.
        spec: of the quantizer, as JSON; its method is in the registry.
        features: length of its rows.
        rows: of a weight, 0 for an activation.
        name: for messages.
        training: whether the quantizer trains.

    Returns:
        New tensors like `scales`.
    """
    try:
        values = json.loads(spec)
        quantizer = METHODS[values["method"]](features, QuantizerSpec(**values), rows or None)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise BellboxError(f"no quantizer's specification: {type(error).__name__} {error}") from None
    quantizer.to(x.device).train(training)
    quantizer.name = name
    own = list(quantizer.own_scales().values())
    for mine, given in zip(own, scales, strict=True):
        mine.data = given.detach().clone()
    quantizer.see_first(x)
    return [mine.detach() for mine in own]


def _fake(x: Tensor, scales: list[Tensor], *_: object) -> list[Tensor]:
    del x
    return [torch.empty_like(scale) for scale in scales]


first_scale = Operation(
    "first_scale(Tensor x, Tensor[] scales, str spec, int features, int rows, str name, bool training) -> Tensor[]",
    _first_scale,
    _fake,
)
"""The first scales of a quantizer, from the rows that it meets first, as an operation that compilers keep."""
