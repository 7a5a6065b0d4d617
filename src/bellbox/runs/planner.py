"""Planner of compute-optimal quantization-aware training: how much of a token budget to train quantized.

Training in full precision first and quantized afterwards beats training quantized from the first step, and the
best share of the quantized part grows with the budget (Dremov, Grangier, Katharopoulos and Hannun, arXiv
2509.22935). What decides is S, the training tokens for each byte of the quantized model:

    S = D / (N b / 8)           D tokens, N parameters, b bits a parameter
    f = exp(-6.7297 / ln S)     the share of the tokens to train quantized

The law was fitted on models of 86M to 2.2B parameters at 1 to 6 bits; it predicts f with a mean error of 0.09.
"""

from __future__ import annotations

import math

from bellbox.errors import BellboxError

EXPONENT = 6.7297


def tokens_per_byte(tokens: int, parameters: int, bits: float) -> float:
    """S: training tokens for each byte that the parameters take at `bits` bits each."""
    return 8 * tokens / (parameters * bits)


def quantized_fraction(tokens: int, parameters: int, bits: float) -> float:
    """The share of a token budget, in (0, 1), that is best trained quantized (arXiv 2509.22935).

    Args:
        tokens: of the whole training.
        parameters: of the model.
        bits: of a quantized parameter; log2(3) for ternary.

    Raises:
        BellboxError: not more than one token a byte, where the law says nothing.
    """
    density = tokens_per_byte(tokens, parameters, bits)
    if density <= 1:
        raise BellboxError(
            f"{tokens:,} tokens for {parameters:,} parameters of {bits:.4g} bits are {density:.3g} tokens a byte: "
            "the law of the best quantized fraction begins above 1; choose a fraction yourself"
        )
    return math.exp(-EXPONENT / math.log(density))
