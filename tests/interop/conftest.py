"""A small packed LLaMA, as Bellbox has it and as transformers loads it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from zoo_packages import package

import bellbox as bb
from bellbox.models import GPT, GPTConfig, Llama, LlamaConfig, build

IDS = torch.arange(2, 34).reshape(2, 16)
LLAMA = LlamaConfig(97, 32, 48, 2, 4, 2, max_position_embeddings=64)


def packed_model(
    config: LlamaConfig | GPTConfig = LLAMA, recipe: bb.Recipe | None = None, embeddings: Any = "fp32"
) -> Llama | GPT:
    """A packed model at random, whose scales have seen data."""
    torch.manual_seed(0)
    model = build(config)
    bb.prepare(model, recipe or bb.Recipe.bbq(2))
    with torch.no_grad():
        model(IDS)
    return bb.convert(model, embeddings)


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
