"""Weights quantized once for all the forwards of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bellbox.core.sharded import is_sharded
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.tools import quantized_layers
from bellbox.ops.encode import autocast_dtype


@contextmanager
def weights_quantized_once(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it, each layer quantizes its weight once, however many forwards and backwards there are.

    Weights do not change between the micro-batches of one optimizer step, so the same codes would be made, and the same
    backward of the quantizer run, for each of them. Here the forwards share a leaf, which gathers the gradient of all
    micro-batches in fp32; at the end it goes through the quantizer, which is linear in it, once. The gradients are the
    same up to summation.

    Weights that FSDP2 shards are quantized in each forward: the whole of all of them would stay in memory.

    For training: every forward within it is one in training mode, and followed by its backward before the end. After
    an exception no gradient is passed on.

    Args:
        model: prepared; must not be changed within.
        dtype: that the forwards compute in, where autocast is entered within; else that of now.
    """
    held: list[tuple[QuantizedLayer, Tensor, Tensor]] = []
    try:
        for _, layer in quantized_layers(model):
            # Of a sharded weight FSDP2 has the whole within a block's forward and backward only.
            if layer.weight_quantizer is None or is_sharded(layer.stored_weight):
                continue
            device = layer.stored_weight.device.type
            coded = layer.trains_on_integers(
                device, dtype or autocast_dtype(device, layer.stored_weight.dtype)
            )
            # fp32, so that the leaf sums in fp32; autocast rounds a copy, to what the quantizer would have given.
            with torch.autocast(device, enabled=False):
                weight = layer.coded_weight() if coded else layer.weight_quantizer(layer.weight_rows())
            quantized = weight if isinstance(weight, Tensor) else weight.coded.value
            leaf = quantized.detach().requires_grad_(quantized.requires_grad)
            layer.held_weight = leaf if isinstance(weight, Tensor) else weight.with_value(leaf)
            held.append((layer, quantized, leaf))
        yield
    finally:
        for layer, _, _ in held:
            layer.held_weight = None
    used = [(quantized, leaf.grad) for _, quantized, leaf in held if leaf.grad is not None]
    if used:
        outputs, gradients = zip(*used, strict=True)
        torch.autograd.backward(outputs, gradients)
