"""A run that is trained in pieces, and its records, to hold against a run in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bellbox.runs.config import TrainConfig
from bellbox.runs.metrics import WALL_CLOCK, read_records
from bellbox.training import Trainer


def records(config: TrainConfig) -> list[dict[str, Any]]:
    """Of a run, without what a clock says."""
    found = read_records(Path(config.folder) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in found]


class Cut(Trainer):
    """Stops after each odd step."""

    def _train_step(self) -> None:
        super()._train_step()
        if self.state.step % 2 == 1 and self.state.step != self.saved_step:
            self.signals.received = 15
