"""A small packed LLaMA, as Bellbox has it and as transformers loads it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "zoo"))
from hf_models import packed_model
from zoo_packages import package

from bellbox.models import GPT, Llama


@pytest.fixture(scope="session")
def transformers() -> Any:
    found: Any = package("transformers")
    if found is None:
        pytest.skip("transformers is not installed")
    found.utils.logging.disable_progress_bar()
    found.logging.set_verbosity_error()
    import bellbox.interop.transformers  # noqa: F401  (registers)

    return found


@pytest.fixture(scope="session")
def ours() -> Llama | GPT:
    """Packed, of `bellbox.models`."""
    return packed_model()


@pytest.fixture(scope="session")
def folder(ours: Llama, transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a folder for transformers."""
    from bellbox.interop.transformers.export import export_packed

    path = tmp_path_factory.mktemp("llama") / "m"
    export_packed(ours, path)
    return path


@pytest.fixture
def theirs(folder: Path, transformers: Any) -> Any:
    """Loaded by transformers, anew for each test."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder)
