from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bellbox.utils import processor
from bellbox.utils.processor import choose_precision, fast_bf16, fast_int8

CPU = torch.device("cpu")
ALL = {"avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BELLBOX_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("features", "bf16", "int8"),
    [
        (set(), False, False),
        ({"avx_vnni"}, False, True),
        ({"avx512_vnni"}, False, True),
        ({"avx512_vnni", "avx512_bf16"}, True, True),
        ({"amx_bf16"}, True, False),
        (ALL, True, True),
    ],
)
def test_what_is_fast_follows_from_the_units(features, bf16, int8, monkeypatch):
    monkeypatch.setattr(processor, "_features", lambda: frozenset(features))
    assert (fast_bf16(), fast_int8()) == (bf16, int8)
    precision, why = choose_precision(CPU)
    assert (precision, why) == (
        ("bf16", "this processor has bf16 units") if bf16 else ("fp32", "this processor has no bf16 units")
    )


@pytest.mark.parametrize(
    ("name", "value", "bf16", "int8"),
    [
        ("BELLBOX_ISA", "avx2", False, False),
        ("BELLBOX_ISA", "portable", False, False),
        ("BELLBOX_ISA", "avx512", True, True),
        ("BELLBOX_ISA", "reference", True, True),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False, False),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_vnni", False, True),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE", False, False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True, True),
    ],
)
def test_a_processor_that_is_held_down_counts_as_the_smaller_one(name, value, bf16, int8, monkeypatch):
    monkeypatch.setattr(processor, "_features", lambda: frozenset(ALL))
    monkeypatch.setenv(name, value)
    assert (fast_bf16(), fast_int8()) == (bf16, int8)
    if not bf16:
        assert choose_precision(CPU) == (
            "fp32",
            "this processor's bf16 units are held back by the environment",
        )


def test_without_torchs_word_the_flags_of_the_system_count(monkeypatch):
    asked = processor._features()
    processor._features.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    try:
        assert processor._features() <= processor._BF16 | processor._INT8
        if sys.platform == "linux" and "avx512_bf16" in asked:
            assert "avx512_bf16" in processor._features()
    finally:
        processor._features.cache_clear()


def test_the_integer_product_of_a_held_process_is_the_float_one():
    code = "from bellbox.ops import integer; print(integer._INTEGER_UNITS)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BELLBOX_ISA": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
