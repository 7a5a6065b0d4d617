"""docs/promises.md names files that are there, and CONTRIBUTING.md names places that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"`((?:tests|native|benchmarks|src|docs)/[\w./-]+)`")


@pytest.mark.parametrize(
    ("page", "least"), [("docs/promises.md", 40), ("docs/releasing.md", 3), ("CONTRIBUTING.md", 15)]
)
def test_what_a_page_names_is_there(page: str, least: int) -> None:
    places = PLACE.findall((ROOT / page).read_text(encoding="utf-8"))
    named = [place for place in places if "NAME" not in place]
    assert len(named) >= least
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_make_targets_that_pages_name_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8")):
            assert target in targets, f"{page.name}: make {target}"


def test_the_fast_tests_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    for name in ("FAST", "SLOWER"):
        listed = re.search(rf"^{name} := (.*)$", makefile, re.MULTILINE)
        assert listed is not None
        assert [place for place in listed[1].split() if not (ROOT / place).exists()] == []
