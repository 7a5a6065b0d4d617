"""The notebooks of examples/ run, and print what stands in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pages import check_printed

for package in ("nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(package, reason="the extra docs: pip install 'bellbox[docs]'")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
sys.path.insert(0, str(FOLDER))
import nbformat  # noqa: E402
import run  # noqa: E402


def printed(notebook: Any) -> list[str]:
    """What each cell of code printed."""
    return [
        "".join(each.get("text", "") for each in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_it_prints_what_stands_in_it(path: Path) -> None:
    kept = nbformat.read(path, as_version=4)
    for said, now in zip(printed(kept), printed(run.executed(path)), strict=True):
        check_printed(said, now)
    assert sum(bool(cell.get("outputs")) for cell in kept.cells) >= 3


def test_it_has_pictures_in_small_files() -> None:
    kinds = {
        kind
        for path in FOLDER.glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    }
    assert "image/png" in kinds
    assert all(path.stat().st_size < 100_000 for path in FOLDER.glob("*.ipynb"))
