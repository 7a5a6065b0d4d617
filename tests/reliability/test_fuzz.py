"""A short run of `benchmarks/reliability/fuzz.py`: mutated files of every format, none of which may do harm."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FORMATS = (
    "packed", "tokens", "npz", "idx", "yaml", "results", "tokenizer", "huggingface", "checkpoint", "run", "metrics",
    "documents",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux can")


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "reliability" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_formats_are_here(fuzz: ModuleType) -> None:
    assert set(FORMATS) == set(fuzz.FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_refused_in_one_line_or_read(fuzz: ModuleType, name: str, tmp_path: Path) -> None:
    good = fuzz.prepare_format(name, tmp_path)
    count = 5 if name == "metrics" else 25  # each of these draws a page of pictures
    found = fuzz.run_format(name, good, seed=7, numbers=list(range(count)), limit=60)
    assert not found.failures, found.examples
    assert sum(found.counts.values()) == count
    assert found.counts["refused"] + found.counts["read"] > 2


def test_a_reader_that_fails_is_found_out(fuzz: ModuleType, tmp_path: Path) -> None:
    """The harness itself: one mutation for each verdict that is a failure."""

    def read(folder: Path) -> bytes:
        content = (folder / "a").read_bytes()
        if "mutated" in folder.name:
            number = len(list(tmp_path.glob("seen*")))
            (tmp_path / f"seen{number}").touch()
            fuzz_ways[number](content)
        return content

    def hang(_: bytes) -> None:
        while True:
            pass

    fuzz_ways = [
        lambda content: content[10**9],
        lambda _: fuzz.os.kill(fuzz.os.getpid(), fuzz.signal.SIGKILL),
        hang,
        lambda _: b"x" * (300 << 20),
        lambda _: fuzz.os.write(2, b"panicked"),
    ]
    fuzz.FORMATS["toy"] = fuzz.Format(
        lambda folder: (folder / "a").write_bytes(b"good") and None, read, ("a",)
    )
    try:
        good = fuzz.prepare_format("toy", tmp_path)
        verdicts = fuzz.run_format("toy", good, 0, list(range(5)), limit=2).counts
    finally:
        del fuzz.FORMATS["toy"]
    assert verdicts.keys() == {"traceback", "crash", "hang", "memory", "noise"}
