from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch

from bellbox.runs.config import TrainConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of token shards."""
    return tiny_run.write_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture
def tiny(tokens: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`tiny(steps=3)`: the configuration of a run that takes milliseconds a step."""

    def make(folder: str = "run", **changes: object) -> TrainConfig:
        return dataclasses.replace(tiny_run.config(tokens, tmp_path / folder), **changes)

    return make
