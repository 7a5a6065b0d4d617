"""The studies that are kept in the repository: their tables and the documents follow from their results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bellbox.comparison import Results, load_grid, summarise, tables
from bellbox.comparison.selection import kept
from bellbox.data.images import ImageDataset
from bellbox.data.images.base import ArraySplit
from bellbox.runs.resolve import resolve
from bellbox.training.check import check_trainable

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "benchmarks" / "studies"
GRIDS = sorted(file for file in STUDIES.glob("*.yaml") if not file.stem.endswith("-base"))
KEPT = sorted(path.parent for path in (STUDIES / "results").glob("*/results.jsonl"))

VOCABULARY = 4096  # of the studies' text, which is no part of the repository


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    """Of CIFAR-10's shape."""
    split = ArraySplit("", np.zeros(1, np.int64), np.zeros((1, 32, 32, 3), np.uint8))
    return ImageDataset("", split, split, tuple("0123456789"), "")


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_every_grid_can_be_trained(file: Path, images: ImageDataset) -> None:
    for cell in load_grid(file).cells:
        config = cell.config(cell.lrs[0], cell.seeds[0])
        if config.optimizer.kind == "soap":
            pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer, of the extra soap")
        vision = config.task == "vision"
        check_trainable(resolve(config, images if vision else SimpleNamespace(vocab_size=VOCABULARY)))


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_kept_tables_are_those_of_the_kept_results(folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy, of the extra cli: intervals of several seeds")
    studies = summarise(Results(folder).all, kept(folder))
    assert (folder / "tables.md").read_text(encoding="utf-8") == tables.markdown(studies)
    assert (folder / "tables.csv").read_text(encoding="utf-8") == tables.comma_separated(studies)
    assert (folder / "tables.tex").read_text(encoding="utf-8") == tables.latex(studies)


def test_the_document_of_results_shows_rows_of_the_kept_tables() -> None:
    known = {
        line for folder in KEPT for line in (folder / "tables.md").read_text(encoding="utf-8").splitlines()
    }
    shown = [
        line
        for line in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    assert shown
    assert [line for line in shown if line not in known] == []
