"""Keeping freed memory: a training step frees and asks again for the same large buffers.

The C library of Linux gives each large buffer back to the system when it is freed, and the system clears every page of
the next one: a third of the time of a small model's step went there. A process that trains may as well keep them.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of mallopt's parameters in malloc.h


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, for the rest of this process; results do not change.

    Returns:
        Whether this system's C library can (glibc); others are left as they are.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
