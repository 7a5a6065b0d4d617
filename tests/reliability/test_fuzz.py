"""A short run of `benchmarks/reliability/fuzz.py`: mutated files of every format, none of which may do harm."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reliability"
COUNTS = {
    "packed": 15, "binarized": 8, "unfinished": 4, "tokens": 40, "npz": 40, "jpegs": 25, "idx": 40, "pictures": 25,
    "yaml": 12, "grid": 3, "recipe": 10, "results": 40, "tokenizer": 40, "sentencepiece": 25, "huggingface": 10,
    "shards": 10, "checkpoint": 40, "run": 6, "resumed": 4, "metrics": 40, "page": 1, "documents": 40,
}  # fmt: skip
"""Mutations of each format: what is slow to read gets fewer."""
NEEDED = {"jpegs": "PIL", "pictures": "PIL", "sentencepiece": "sentencepiece"}
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux can")


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("fuzz")
    finally:
        sys.path.remove(str(FOLDER))


def test_all_formats_are_here(fuzz: ModuleType) -> None:
    assert set(COUNTS) == set(fuzz.FORMATS)


@pytest.mark.parametrize("name", COUNTS)
def test_mutated_files_are_refused_in_one_line_or_read(fuzz: ModuleType, name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDED.get(name, "yaml"))
    good = fuzz.prepare_format(name, tmp_path)
    found = fuzz.run_format(name, good, seed=7, numbers=list(range(COUNTS[name])), limit=60)
    assert not found.failures, found.examples
    assert sum(found.counts.values()) == COUNTS[name]
    assert found.counts["refused"] + found.counts["read"] > COUNTS[name] // 6


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
        lambda _: b"x" * (700 << 20),
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
