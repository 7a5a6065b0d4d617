"""Quantization methods, one a file, all keeping the contract of `base.py`."""

from __future__ import annotations

from bellbox.errors import BellboxError
from bellbox.quantizers.base import Quantizer, read_options, set_debug
from bellbox.quantizers.bbq import BBQ
from bellbox.quantizers.kmeans import KMeans
from bellbox.quantizers.lsq import LSQ
from bellbox.quantizers.n2uq import N2UQ
from bellbox.quantizers.nf import NF
from bellbox.quantizers.pact import PACT
from bellbox.quantizers.quest import QuEST
from bellbox.quantizers.rtn import RTN
from bellbox.quantizers.seq import SEQ
from bellbox.quantizers.ternary import TernaryMass, TernarySupport
from bellbox.recipe import QuantizerSpec

__all__ = ["METHODS", "Quantizer", "build_quantizer", "check_method", "set_debug"]

METHODS: dict[str, type[Quantizer]] = {
    kind.method: kind
    for kind in (BBQ, QuEST, LSQ, PACT, NF, N2UQ, SEQ, KMeans, TernarySupport, TernaryMass, RTN)
}
"""Method name -> class. Add your own: see `docs/methods.md`."""


def check_method(method: str, options: dict[str, bool | float | str]) -> type[Quantizer]:
    """The class of a method, its options read for a trial.

    Raises:
        BellboxError: an unknown method or option, or an option of the wrong type.
    """
    if method not in METHODS:
        raise BellboxError(f"no quantization method {method!r}; there are: {', '.join(METHODS)}")
    read_options(method, METHODS[method].Options, options)
    return METHODS[method]


def build_quantizer(spec: QuantizerSpec, features: int, rows: int | None, name: str) -> Quantizer:
    """A quantizer from its specification.

    Args:
        spec: method and numbers.
        features: length of the last dimension.
        rows: rows of a weight, or None for an activation.
        name: dotted name, for messages.

    Raises:
        BellboxError: an unknown method, or numbers out of range.
    """
    quantizer = check_method(spec.method, spec.options)(features, spec, rows)
    quantizer.name = name
    return quantizer
