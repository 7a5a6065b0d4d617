"""WebAssembly's kernels in node: the bits of the portable ones over random shapes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "build" / "checks" / "web" / "check.js"


@pytest.mark.skipif(
    shutil.which("node") is None or not CHECK.is_file(), reason=f"no node, or no {CHECK}: make web-check"
)
def test_they_give_the_bits_of_the_portable_ones() -> None:
    command = ["node", "--no-experimental-fetch", str(CHECK), "40", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wasm: the same bits" in done.stdout
