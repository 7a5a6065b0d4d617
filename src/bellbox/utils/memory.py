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
