"""A tokenizer and a packed folder for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from built_runtime import ROOT, packed

from bellbox.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (ROOT / "LICENSE").read_text()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    Tokenizer.train([text], 600).save(path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return packed(tmp_path_factory.mktemp("packed") / "m", tokenizer, "tiny", bits=2, embedding_bits=4)
