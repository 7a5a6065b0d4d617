"""Weights that harden: in the first steps BBQ's box is not cut yet, then more and more of it (soft to hard).

Hestia (arXiv 2601.20745) relaxes ternary weights by a softmax over the levels whose temperature falls. BBQ has a
relaxation of its own, which its gradient is that of in any case: the value before it is cut, `gamma (2 Phi(v) - 1)`. In
training a weight is a mean of both, `(1 - a) x_hat + a gamma (2 Phi(v) - 1)`, with a share a that falls from 1 to 0 by
a half cosine. Inputs are cut from the first step on, and so is all in evaluation.
"""

from __future__ import annotations

import math

from torch import nn

from bellbox.nn import quantized_layers
from bellbox.quantizers.bbq import BBQ
from bellbox.runs.config import ResolvedConfig
from bellbox.runs.phases import quantized_from, soft_steps


def softness(config: ResolvedConfig, step: int) -> float:
    """Share of a weight that is not cut in a step of a run: a function of the step alone.

    Args:
        config: of the run.
        step: 0 .. total_steps - 1.
    """
    stretch, done = soft_steps(config), step - quantized_from(config)
    return (1 + math.cos(math.pi * done / stretch)) / 2 if 0 <= done < stretch else 0.0


def soften(model: nn.Module, share: float) -> None:
    """Leave a share of each weight of a prepared model uncut in training, from now on."""
    for _, layer in quantized_layers(model):
        if isinstance(layer.weight_quantizer, BBQ):
            layer.weight_quantizer.soft = share
