from __future__ import annotations

import sys

import pytest

from waiting import run

TRIAL = """
import resource
import torch
from bellbox.utils.malloc import keep_freed_memory

def cleared(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.zeros(1 << 22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
cleared(20)
print(cleared(20))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can")
def test_large_buffers_that_were_freed_are_used_again() -> None:
    # 16 MiB are 4,096 pages, which the system would have to clear each of the 20 times; the heap may still grow once,
    # and has had the time to settle before.
    done = run([sys.executable, "-c", TRIAL])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 4096
