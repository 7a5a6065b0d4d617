from __future__ import annotations

from pathlib import Path

import pytest
from data_prose import sentences

from bellbox.data.prepare import prepare
from bellbox.data.shards import TokenDataset
from bellbox.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(200)], 300)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A text file of 40 documents."""
    file = tmp_path / "documents.txt"
    texts = [f"Document {i}.\n{sentences(5, i)}\n" for i in range(40)]
    file.write_text("<|endoftext|>\n".join(texts), encoding="utf-8")
    return file


@pytest.fixture
def dataset(tmp_path: Path, documents: Path, small_tokenizer: Tokenizer) -> TokenDataset:
    return prepare(
        [documents], tmp_path / "dataset", tokenizer=small_tokenizer, valid_fraction=0.2, shard_tokens=700
    )
