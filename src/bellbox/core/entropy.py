"""Entropy: how many bits the codes really carry.

n levels carry log2(n) bits only when each is used equally often. That is what Bell Box Quantization is for,
so it is measured everywhere: of weights, of activations, layer by layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ENTROPY_LIMIT = 1 << 28
"""Weights whose codes a model card counts; of more a sample of layers would say too little."""


def code_counts(codes: Tensor, n: int) -> Tensor:
    """How often each code occurs.

    Args:
        codes: integers 0..n-1, any shape.
        n: number of levels.

    Returns:
        int64 `[n]`.
    """
    return torch.bincount(codes.reshape(-1).to(torch.int64), minlength=n)


def entropy_bits(counts: Tensor) -> float:
    """Shannon entropy, in bits, of the distribution given by counts; 0.0 where nothing was counted.

    Args:
        counts: non-negative, any shape.
    """
    probabilities = counts.reshape(-1).to(torch.float64)
    total = float(probabilities.sum())
    if total == 0:
        return 0.0
    probabilities = probabilities[probabilities > 0] / total
    return max(0.0, -float((probabilities * probabilities.log2()).sum()))


def saturated_fraction(counts: Tensor) -> float:
    """Share of codes at either end of the range (0 or n-1); 2/n for equally used codes, NaN for no counts."""
    total = int(counts.sum())
    return (int(counts[0]) + int(counts[-1])) / total if total else math.nan
