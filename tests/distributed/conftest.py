from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Ranks

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

import tiny_run


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(Path(folder))
        try:
            yield started
        finally:
            started.close()


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_tokens(tmp_path_factory.mktemp("data") / "tokens")
