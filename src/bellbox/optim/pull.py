"""Pulling weights towards the values of their codes while they are trained, after CAGE (arXiv 2510.18784).

Near the end of a low-bit training weights sit at the thresholds between two codes and go to and fro. CAGE adds a
second force to each step, the way from a weight to what it is quantized to:

    w <- w + U + lr * lambda * (Q(w) - w)        U: the optimizer's update

with lambda zero at first and rising to its peak over the last steps.

**Which Q.** CAGE's quantizers round, so Q(w) is the dequantized weight. BBQ's levels do not resemble the weight, by
design. What its code says of a weight is the bin of a bell that it lies in, so here the value of a code is the mean of
that bin in the weight's own domain:

    Q(w) = sigma n (phi(t_k) - phi(t_(k+1)))        t_k <= w / sigma < t_(k+1), n bins of one probability

Rows keep their codes under the pull: within a row all weights of a code move to one point of their bin, and the RMS,
which shrinks, is divided out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels
from bellbox.core.sharded import whole, write_whole
from bellbox.errors import BellboxError
from bellbox.nn import QuantizedExpert, QuantizedLayer, quantized_layers
from bellbox.ops.encode import SIGMA_FLOOR
from bellbox.quantizers.bbq import BBQ, bin_moments


def bin_means(levels: Levels) -> tuple[float, ...]:
    """Mean of a standard normal variable within each bin of equal probability, rising, `n` numbers.

    Args:
        levels: of Gaussian quantiles (`Levels.gaussian`).

    Examples:
        >>> from bellbox.core.grid import Levels
        >>> [round(mean, 3) for mean in bb.optim.bin_means(Levels.gaussian(4))]
        [-1.271, -0.325, 0.325, 1.271]
    """
    return tuple(levels.n * moment for moment in bin_moments(levels))


@torch.no_grad()
def pull_to_codes(model: nn.Module, share: float) -> None:
    """Move the weights of BBQ's layers that have a gradient towards the values of their codes; before a step.

    Args:
        model: prepared. Layers of other methods are left alone.
        share: of the way, in [0, 1]: learning rate times lambda.

    Raises:
        BellboxError: a share beyond, or weights that are nested, whose code is another at each width.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32)), bb.Recipe.bbq(bits=2, keep=()))
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> before = model[0].weight_codes()
        >>> bb.optim.pull_to_codes(model, 0.1)
        >>> torch.equal(model[0].weight_codes(), before)
        True
    """
    if not 0 <= share <= 1:
        raise BellboxError(f"the share of the way to a code's value is {share}, must be in [0, 1]")
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, BBQ) or isinstance(layer, QuantizedExpert):
            continue
        if quantizer.widths:
            raise BellboxError(
                f"{quantizer.name or 'a weight'} is nested: its code, and so what it would be pulled to, is another "
                "at each width"
            )
        stored = layer.stored_weight
        if stored.grad is not None:
            full = whole(stored.detach())
            write_whole(stored.detach(), torch.lerp(full, _values(layer, quantizer, full), share))


def _values(layer: QuantizedLayer, quantizer: BBQ, stored: Tensor) -> Tensor:
    """The values of the codes of a stored weight, in its shape and domain."""
    turned = stored if layer.weights_rotated else layer.turned(stored)
    # A rearrangement, whose transpose is its inverse.
    rows, back, *_ = torch.func.vjp(layer.rows_of, turned)
    sigma = quantizer.measure(rows).clamp(min=SIGMA_FLOOR).to(rows.dtype)
    codes = torch.bucketize(rows / sigma, quantizer.thresholds(rows.device), right=True)
    means = torch.tensor(bin_means(quantizer.levels), dtype=rows.dtype, device=rows.device)
    (values,) = back(means[codes] * sigma)
    return values if layer.weights_rotated else layer.turned(values, back=True)
