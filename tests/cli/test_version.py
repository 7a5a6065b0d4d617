"""`bellbox --version -v` as a program: it names every operation and what would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bellbox.ops import native


def said(**environment: str) -> list[str]:
    program = Path(sys.executable).with_name("bellbox")
    done = subprocess.run(
        [program, "--version", "-v"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
def test_every_operation_is_named_with_its_backends():
    lines = said()
    assert native.isa() in lines[0]
    backends = dict(line.strip().split(": ") for line in lines if line.startswith("  "))
    assert {"packed_linear", "packed_conv2d", "binarized_linear", "encode", "rotate"} <= set(backends)
    assert backends["packed_linear"] == "cpu, triton, reference"
    assert backends["binarized_linear"] == "cpu, reference"
    assert backends["cpu"] == native.describe()
    assert any(line.startswith("precision auto on the CPU: ") for line in lines)


def test_without_kernels_it_says_so():
    lines = said(BELLBOX_ISA="reference")
    assert "reference" in lines[0]
    assert native.isa() == "reference" or native.isa() not in lines[0]


def test_kernels_that_were_built_without_openmp_say_so(monkeypatch):
    monkeypatch.delenv("BELLBOX_ISA", raising=False)
    for threads, says in (
        (True, "native portable"),
        (False, "native portable, on one thread (built without OpenMP)"),
    ):
        module = SimpleNamespace(isa=lambda: "portable", threads=threads)
        monkeypatch.setattr(native, "_module", lambda module=module: module)
        assert native.describe() == says
