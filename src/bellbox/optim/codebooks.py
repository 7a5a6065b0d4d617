"""Codebooks of k-means fitted anew while the weights learn: a function of weights, squared gradients and step."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor, nn

from bellbox.core.sharded import whole
from bellbox.errors import BellboxError
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.tools import quantized_layers


def refit_codebooks(
    model: nn.Module, squared_gradients: Mapping[Tensor, Tensor] | None = None, step: int | None = None
) -> list[str]:
    """Fit the codebooks of k-means anew, each to its weight as it is now.

    A function of weights, squared gradients and step alone, so a run that goes on from a checkpoint does the same.

    Args:
        model: prepared.
        squared_gradients: stored weight -> its squared gradients, of the same shape, in any unit: `second_moments` of
            an optimizer, or sums by `add_squared_gradients`. Needed by quantizers with the option `fisher`; others
            take no notice of them.
        step: optimizer steps done so far: only codebooks whose `refit_every` divides it are fitted. All where None.

    Returns:
        names of the layers whose codebook was fitted.

    Raises:
        BellboxError: a codebook that counts errors by squared gradients, and there are none for its weight.
    """
    fitted: list[str] = []
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if quantizer is None or not quantizer.refits or not _is_due(quantizer.refit_every, step):
            continue
        counts = _squares_of(name, layer, squared_gradients or {}) if quantizer.by_squared_gradients else None
        # The fit is one of all entries: every process that holds a part makes the same.
        quantizer.refit(layer.rows_of(whole(layer.stored_weight.detach())), counts)
        fitted.append(name)
    return fitted


def _is_due(every: int, step: int | None) -> bool:
    return step is None or (every > 0 and step > 0 and step % every == 0)


def _squares_of(name: str, layer: QuantizedLayer, known: Mapping[Tensor, Tensor]) -> Tensor:
    found = known.get(layer.parameter)
    if found is None:
        raise BellboxError(
            f"{name or 'the layer'}: fisher=true weighs errors by squared gradients, and there are none of its weight: "
            "pass second_moments(optimizer) of an Adam that has stepped, or sums of add_squared_gradients"
        )
    return layer.rows_of(layer.part_of(whole(found)))


def second_moments(*optimizers: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Parameter -> the running mean of its squared gradient, of optimizers of Adam's kind; others have none."""
    return {
        parameter: state["exp_avg_sq"]
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if "exp_avg_sq" in state
    }


@torch.no_grad()
def add_squared_gradients(model: nn.Module, sums: MutableMapping[Tensor, Tensor]) -> None:
    """Add the squares of the gradients of now to `sums`, for optimizers without a second moment.

    Args:
        model: prepared, after a backward; only weights whose codebook is fitted by squared gradients are looked at.
        sums: stored weight -> fp32 sum, the shape of the weight; begin with an empty dict.
    """
    weights = {
        layer.parameter  # of experts: one parameter of many layers
        for _, layer in quantized_layers(model)
        if layer.weight_quantizer is not None and layer.weight_quantizer.by_squared_gradients
    }
    for weight in weights:
        if weight.grad is not None:
            square = weight.grad.float().square()
            sums[weight] = sums[weight] + square if weight in sums else square
