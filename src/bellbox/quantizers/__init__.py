"""Quantization methods, one a file, all keeping the contract of `base.py`."""

from __future__ import annotations

from bellbox.errors import BellboxError
from bellbox.levels import Levels
from bellbox.quantizers.base import Quantizer, Statistic, set_debug
from bellbox.quantizers.bbq import BBQ
from bellbox.recipe import QuantizerSpec

__all__ = ["BBQ", "METHODS", "Quantizer", "Statistic", "build_quantizer", "set_debug"]

METHODS = {"bbq": BBQ}
"""Method name -> class."""


def build_quantizer(spec: QuantizerSpec, features: int, rows: int | None, name: str) -> BBQ:
    """A quantizer from its specification.

    Args:
        spec: method and numbers.
        features: length of the last dimension.
        rows: rows of a weight, or None for an activation.
        name: dotted name, for messages.

    Raises:
        BellboxError: an unknown method, or numbers out of range.
    """
    if spec.method not in METHODS:
        raise BellboxError(f"no quantization method {spec.method!r}; there are: {', '.join(METHODS)}")
    quantizer = METHODS[spec.method](
        features,
        Levels.gaussian(spec.levels, spec.zero_point),
        spec.statistic,
        spec.block,
        rows,
        spec.gamma_init,
    )
    quantizer.name = name
    return quantizer
