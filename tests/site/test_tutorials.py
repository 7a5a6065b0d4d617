"""The tutorials and how-tos run as they are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import ROOT, blocks_of, check_printed, run_page, same_line

from bellbox.quantizers import METHODS

DOCS = ROOT / "docs"


@pytest.fixture
def alone() -> Iterator[None]:
    """What a page changes of this process is put back: methods, modules, the path, the random state, threads."""
    before = dict(METHODS)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    for name in set(METHODS) - set(before):
        METHODS.pop(name)
    sys.modules.pop("logistic", None)
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


def slow(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [slow("tutorials/train"), slow("tutorials/compare"), slow("tutorials/deploy"), "howto"]
)
def test_the_page_does_what_it_says(name: str, tmp_path: Path) -> None:
    run_page(DOCS / f"{name}.md", tmp_path)


def test_an_output_that_is_another_one_is_noticed() -> None:
    assert same_line("loss 6.02 ...", "loss 6.1 and the rest")
    assert not same_line("loss 6.02", "loss 7.02")
    assert not same_line("equal True", "equal False")
    check_printed("one\nthree", "one\ntwo\nthree")
    with pytest.raises(AssertionError, match="not printed"):
        check_printed("three\none", "one\ntwo\nthree")


def test_blocks_are_found_with_their_output() -> None:
    found = blocks_of(DOCS / "tutorials" / "train.md")
    assert [block.language for block in found].count("python") >= 5
    assert sum(block.printed is not None for block in found) >= 4
