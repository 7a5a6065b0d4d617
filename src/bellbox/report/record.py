"""What a run wrote about itself: metrics, configuration, environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellbox.errors import BellboxError
from bellbox.files import read_json
from bellbox.training.metrics import read_records


@dataclass(frozen=True)
class RunRecord:
    """The record of one run; the records' fields are those of `bellbox.training.metrics`."""

    name: str
    """Name of the run folder."""
    train: list[dict[str, Any]]
    """Training records, in order."""
    evals: list[dict[str, Any]]
    """Validation records, in order."""
    config: str
    """The resolved configuration, YAML, as it lies in the folder."""
    environment: dict[str, Any]
    """Versions, processor, git revision; empty where none was recorded."""

    @property
    def is_vision(self) -> bool:
        """Whether it is a vision task's: judged by accuracy, counted in images."""
        return any("accuracy" in record for record in self.evals)

    @property
    def unit(self) -> str:
        """What its `tokens` are."""
        return "images" if self.is_vision else "tokens"

    def at(self, step: int | None) -> dict[str, Any] | None:
        """The validation record of a step; the last one where it has none or no step is asked for."""
        exact = [record for record in self.evals if record["step"] == step]
        return (exact or self.evals or [None])[-1]


def read_record(folder: str | os.PathLike[str]) -> RunRecord:
    """Read a run folder's record.

    Raises:
        BellboxError: no run there, damaged files, or nothing recorded yet.
    """
    root = Path(folder)
    try:
        config = (root / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise BellboxError(f"{root}: no run here, config.yaml cannot be read") from None
    records = read_records(root / "metrics.jsonl")
    if not records:
        raise BellboxError(f"{root / 'metrics.jsonl'}: nothing is recorded yet; train the run first")
    environment = root / "environment.json"
    return RunRecord(
        name=root.resolve().name,
        train=[record for record in records if record["kind"] == "train"],
        evals=[record for record in records if record["kind"] == "eval"],
        config=config,
        environment=read_json(environment) if environment.is_file() else {},
    )
