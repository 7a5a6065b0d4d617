"""Full precision around a package's own layers, so that rows differ by their layers and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def widened(
    model: nn.Module, own: Callable[[nn.Module], bool], inside: torch.dtype | None = None
) -> nn.Module:
    """Have everything but a package's own layers compute in fp32, which is exact for what is stored narrower.

    Args:
        model: as the package opened it; changed in place.
        own: whether a module is one of the package's layers; it and what is in it stay as they are.
        inside: what those layers compute in, where they do not take fp32: their inputs are rounded to it, and their
            outputs come back in fp32.

    Returns:
        the same model.
    """
    for module in _outside(model, own, inside):
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.float()
    return model.eval()


def _outside(
    model: nn.Module, own: Callable[[nn.Module], bool], inside: torch.dtype | None
) -> list[nn.Module]:
    if own(model):
        if inside is not None:
            _converse(model, inside)
        return []
    return [model, *(each for child in model.children() for each in _outside(child, own, inside))]


def _converse(layer: nn.Module, dtype: torch.dtype) -> None:
    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].to(dtype), *inputs[1:]

    layer.register_forward_pre_hook(narrow)
    layer.register_forward_hook(lambda _, inputs, output: output.float())  # noqa: ARG005
