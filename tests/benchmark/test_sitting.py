"""docs/performance.md says what its sitting measured, and what the split of work allows on paper."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "benchmarks" / "sittings" / "zen4.json"
sys.path.insert(0, str(ROOT / "benchmarks"))
import sitting  # noqa: E402
import threads_on_paper  # noqa: E402


@pytest.mark.parametrize(
    ("path", "figures"),
    [(PAGE, FIGURES), (FIGURES.with_name("xeon.md"), FIGURES.with_name("xeon.json"))],
    ids=["zen4", "xeon"],
)
def test_the_tables_are_those_of_the_sitting(path: Path, figures: Path):
    page, found = path.read_text(encoding="utf-8"), json.loads(figures.read_text(encoding="utf-8"))
    assert sitting.filled(page, found) == page
    assert set(re.findall(r"<!-- sitting: (.*?) -->", page)) == set(sitting.TABLES)


def test_another_figure_is_another_page():
    page, found = PAGE.read_text(encoding="utf-8"), json.loads(FIGURES.read_text(encoding="utf-8"))
    found["start"]["figures"]["import torch"] = [123.0] * 5
    assert "123.00 s" in sitting.filled(page, found)
    with pytest.raises(KeyError, match="nothing"):
        sitting.filled("<!-- sitting: nothing --><!-- /sitting -->", found)


def test_the_split_on_paper_is_the_page_s():
    page = PAGE.read_text(encoding="utf-8")
    for name, config in threads_on_paper.models().items():
        gains = [f"{threads_on_paper.gain(config, threads):.1f} x" for threads in (2, 8, 64)]
        assert f"| {name} | {' | '.join(gains)} |" in page


def test_a_region_is_as_slow_as_its_busiest_thread():
    region = threads_on_paper.Region("three parts for two", 2, 3.0, 3)
    assert region.time == 2.0
    assert threads_on_paper.constant("kLinearGrain") > 0
    with pytest.raises(LookupError, match="kNothing"):
        threads_on_paper.constant("kNothing")
