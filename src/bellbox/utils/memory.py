"""Memory that this process has taken from the machine."""

from __future__ import annotations

import sys


def peak_memory() -> int | None:
    """Most bytes of memory that the process has held at once, pages of mapped files included; None where unknown."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_in_words(before: str) -> str:
    """`before` and the peak, for people; nothing where it is unknown."""
    peak = peak_memory()
    return "" if peak is None else f"{before}peak memory {peak / 2**20:,.0f} MiB, Python and torch included"
