"""Calls that nobody should make end in a refusal, whoever makes them, and never in a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ABUSES = Path(__file__).with_name("abuses.py")


@pytest.mark.parametrize("backend", ["", "reference"])
def test_every_abuse_is_refused(backend):
    environment = {**os.environ, "BELLBOX_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ABUSES], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    last = done.stderr.strip().splitlines()[-40:]
    if done.returncode < 0:
        pytest.fail(f"{signal.Signals(-done.returncode).name} in or after: {last}")
    assert done.returncode == 0, last
    *wrong, summary = done.stdout.strip().splitlines()
    assert wrong == []
    assert int(summary.split()[0]) > 110
