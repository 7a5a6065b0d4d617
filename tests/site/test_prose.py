"""Sentences of the documents keep to the bars of benchmarks/prose.py, page by page."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import prose  # noqa: E402


@pytest.mark.parametrize("page", prose.documents(), ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    counts = prose.lengths([page])
    if len(counts) < 5:
        pytest.skip("too few sentences for a median")
    assert statistics.median(counts) <= prose.MEDIAN
    assert sum(count > prose.LONG for count in counts) <= max(1, prose.SHARE * len(counts))


def test_what_a_sentence_is() -> None:
    text = (
        "# Not this one. Nor this\n\nOne `x = 1. y` two\nthree. Four, e.g. five six! See [a page](x.md#y.z) here: it"
        " goes on.\n\n| not. | this |\n\n- An item of a list\n- Another one. In two\n\n```python\nnot. This\n```\n"
    )
    assert [len(each.split()) for each in prose.sentences(text)] == [4, 4, 7, 5, 2, 2]
