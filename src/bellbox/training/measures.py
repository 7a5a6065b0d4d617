"""Use of the codes: entropy, saturation and gamma of every quantized layer.

Entropy is the reason to be of the method (see `bellbox.core.entropy`), so it is measured at every validation.
Weights are encoded as `convert` would encode them. Activations are counted over a few fixed sequences of the
validation
split: the counts of the whole split would change the numbers in the fourth digit only and cost a bincount a
layer a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.entropy import code_counts, entropy_bits, saturated_fraction
from bellbox.nn import quantized_layers, record_activation_codes


def quantization_measures(model: nn.Module, forward: Callable[[], object]) -> dict[str, Any]:
    """The fields `weight_entropy`, `activation_entropy`, `gamma`, `saturated` of an evaluation record.

    Args:
        model: prepared, in evaluation mode.
        forward: runs the model over the sequences whose activations are counted.

    Returns:
        An empty dict where no layer is quantized. A quantizer that layers share is reported under the
        first.
    """
    layers = list(quantized_layers(model))
    if not layers:
        return {}
    weights: dict[str, Tensor] = {}
    gamma: dict[str, dict[str, Any]] = {"weight": {}, "activation": {}}
    seen: set[int] = set()
    for name, layer in layers:
        weight, activation = layer.weight_quantizer, layer.activation_quantizer
        if weight is not None:
            weights[name] = code_counts(layer.weight_codes(), weight.levels.n)
            if isinstance(learned := weight.learned_scale, Tensor):
                gamma["weight"][name] = _spread(learned)
        if activation is not None and id(activation) not in seen:
            seen.add(id(activation))
            if activation.gamma is not None:
                gamma["activation"][name] = activation.gamma.item()
    with torch.no_grad(), record_activation_codes(model) as counted:
        forward()
    activations = dict(counted)
    return {
        "weight_entropy": _by_layer(weights, entropy_bits),
        "activation_entropy": _by_layer(activations, entropy_bits),
        "gamma": gamma,
        "saturated": {
            "weight": _by_layer(weights, saturated_fraction),
            "activation": _by_layer(activations, saturated_fraction),
        },
    }


def _by_layer(counts: dict[str, Tensor], measure: Callable[[Tensor], float]) -> dict[str, Any]:
    layers = {name: measure(count) for name, count in counts.items()}
    return {"mean": sum(layers.values()) / len(layers) if layers else None, "layers": layers}


def _spread(gamma: Tensor) -> dict[str, float]:
    values = gamma.detach().double().flatten()
    return {
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
        "min": float(values.min()),
        "max": float(values.max()),
    }
