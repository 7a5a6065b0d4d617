"""Quantization methods, one a file, all keeping the contract of `base.py`."""

from __future__ import annotations

from bellbox.quantizers.base import Quantizer, set_debug
from bellbox.quantizers.bbq import BBQ
from bellbox.quantizers.cewt import CEWTQuantizer
from bellbox.quantizers.kmeans import KMeans
from bellbox.quantizers.lsq import LSQ
from bellbox.quantizers.n2uq import N2UQ
from bellbox.quantizers.nf import NF
from bellbox.quantizers.pact import PACT
from bellbox.quantizers.quest import QuEST
from bellbox.quantizers.registry import METHODS, check_method
from bellbox.quantizers.rtn import RTN
from bellbox.quantizers.seq import SEQ
from bellbox.quantizers.spec import QuantizerSpec
from bellbox.quantizers.ternary import TernaryMass, TernarySupport

__all__ = [
    "BBQ", "LSQ", "METHODS", "N2UQ", "NF", "PACT", "RTN", "SEQ", "CEWTQuantizer", "KMeans", "QuEST", "Quantizer",
    "QuantizerSpec", "TernaryMass", "TernarySupport", "build_quantizer", "check_method", "set_debug",
]  # fmt: skip


def build_quantizer(spec: QuantizerSpec, features: int, rows: int | None, name: str) -> Quantizer:
    """A quantizer from its specification.

    Args:
        spec: method and numbers.
        features: length of the last dimension.
        rows: rows of a weight, or None for an activation.
        name: dotted name, for messages.

    Raises:
        BellboxError: an unknown method, or numbers out of range.

    Examples:
        >>> from bellbox.quantizers import build_quantizer
        >>> quantizer = build_quantizer(bb.QuantizerSpec("quest", 4), features=64, rows=None, name="an input")
        >>> codes, row_scales = quantizer.encode(torch.randn(2, 64))
        >>> codes.shape, codes.dtype, row_scales.shape
        (torch.Size([2, 64]), torch.uint8, torch.Size([2, 1]))
    """
    quantizer = check_method(spec.method, spec.options)(features, spec, rows)
    quantizer.name = name
    return quantizer
